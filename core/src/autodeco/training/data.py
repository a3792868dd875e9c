"""Training data: JSON lines in three schemas, checked line by line.

``{"prompt", "completion"}`` (text, already formatted), ``{"inputs": {"p_ids", "r_ids"}}`` (ids)
and ``{"messages": [...]}`` (a chat, through the checkpoint's own template).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from autodeco.errors import DataError
from autodeco.foreign import each_once
from autodeco.heads.random import counter_uniform
from autodeco.training.tokenization import Tokenized, check_tokenizer, tokenize_chat, tokenize_text

_KEYS = ("prompt", "completion", "inputs", "messages", "tools")
_SPLIT_STREAM = 0x5EED
_LONGEST_LINE = 64 << 20  # bytes; a sample of a million tokens is a tenth of it


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        id: The number of its line in the file, from 0; stable whatever is dropped.
        ids: int32 [n], token ids.
        predict: bool [n], True where position i predicts a completion token, ``ids[i + 1]``.
        line: Line in the file, from 1.
    """

    id: int
    ids: NDArray[np.int32]
    predict: NDArray[np.bool_]
    line: int


@dataclass(frozen=True)
class SampleSet:
    """The samples of a file.

    Attributes:
        samples: In the order of the file.
        dropped: Reason -> how many were left out.
        path: The file.
        skipped_turns: Assistant turns in chats that are context only, as the template rewrites
            them once the chat goes on.
    """

    samples: tuple[Sample, ...]
    dropped: Mapping[str, int]
    path: Path
    skipped_turns: int = 0


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's content, read in pieces.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(
            f"cannot read the data: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number (from 1) and record of a JSON lines file; blank lines are passed over.

    Raises:
        DataError: The file cannot be read, is not UTF-8, or a line is no JSON object.
    """
    try:
        with path.open("rb") as stream:
            for number, raw in numbered_lines(stream, path):
                record = _parse(raw, f"{path}:{number}")
                if record is not None:
                    yield number, record
    except OSError as error:
        raise DataError(
            f"cannot read the data: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def numbered_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields line number (from 1) and line; a file without line ends does not fill the memory.

    Raises:
        DataError: A line has more than 64 MiB.
    """
    number = 0
    while raw := stream.readline(_LONGEST_LINE + 1):
        number += 1
        if len(raw) > _LONGEST_LINE:
            raise DataError(
                f"the line is longer than {_LONGEST_LINE >> 20} MiB",
                where=f"{path}:{number}",
                fix="write one JSON object a line",
            )
        yield number, raw


def _parse(raw: bytes, where: str) -> dict[str, Any] | None:
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: {error}", where=where, fix="save the file in UTF-8 encoding"
        ) from error
    if not text:
        return None
    try:
        record = json.loads(text, object_pairs_hook=each_once)
        halved = "\\u" in text and _has_half_character(record)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        column = getattr(error, "colno", 1)
        raise DataError(
            f"malformed JSON: {error}",
            where=f"{where}:{column}",
            fix="write one JSON object a line",
        ) from error
    if halved:
        raise DataError(
            "the text holds half a character (a \\ud800..\\udfff escape without its pair)",
            where=where,
            fix="write the whole character, or remove it",
        )
    if not isinstance(record, dict):
        raise DataError(
            f"the line holds a {type(record).__name__}, not an object",
            where=where,
            fix="write one JSON object a line",
        )
    return record


def _has_half_character(record: Any) -> bool:
    """Whether a text in it cannot be encoded, so that no tokenizer takes it."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def load_samples(
    path: Path,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_loss: bool = True,
    eos_token_ids: Sequence[int] = (),
) -> SampleSet:
    """Reads, checks and tokenizes a file.

    Args:
        path: JSON lines; schemas may be mixed.
        tokenizer: A transformers tokenizer.
        vocab_size: Rows of the output layer.
        max_length: Longer samples (tokens) are dropped, never cut.
        chat_template_kwargs: Passed to the chat template.
        eos_loss: Whether the end-of-turn token is learned from.
        eos_token_ids: Tokens that end an answer; the first is appended to completions.

    Raises:
        DataError: A line cannot be used (the message names file and line), the tokenizer does not
            fit the model, or no sample is left.
    """
    check_tokenizer(tokenizer, vocab_size)
    samples: list[Sample] = []
    dropped: Counter[str] = Counter()
    skipped = 0
    for number, record in read_records(path):
        where = f"{path}:{number}"
        try:
            tokenized = _tokenize(
                record, tokenizer, dict(chat_template_kwargs or {}), eos_token_ids
            )
        except DataError as error:
            raise DataError(error.what, where=where, fix=error.fix) from error
        _check_ids(tokenized.ids, vocab_size, where)
        if len(tokenized.ids) > max_length:
            dropped[f"longer than --max-length {max_length}"] += 1
            continue
        predict = _predict(tokenized, () if eos_loss else eos_token_ids)
        if not predict.any():
            dropped["nothing to learn from (only the end-of-turn token)"] += 1
            continue
        ids = np.asarray(tokenized.ids, dtype=np.int32)
        samples.append(Sample(number - 1, ids, predict, number))
        skipped += tokenized.skipped_turns
    if not samples:
        raise DataError(
            "no sample is left" + (f": {dict(dropped)}" if dropped else ": the file is empty"),
            where=str(path),
            fix="check the file and --max-length",
        )
    return SampleSet(tuple(samples), dict(dropped), path, skipped)


def _tokenize(
    record: dict[str, Any], tokenizer: Any, kwargs: dict[str, Any], eos: Sequence[int]
) -> Tokenized:
    # a table with a column for each schema has nulls in the others
    record = {key: value for key, value in record.items() if value is not None}
    schemas = [name for name in ("messages", "inputs", "completion") if name in record]
    if len(schemas) > 1:
        raise DataError(
            f"the line has several schemas: {', '.join(schemas)}", fix="leave one, the rest null"
        )
    if "messages" in record:
        return tokenize_chat(tokenizer, record["messages"], record.get("tools"), kwargs, eos)
    if "inputs" in record:
        inputs = record["inputs"]
        if not isinstance(inputs, dict):
            raise DataError("inputs is no object", fix='write {"inputs": {"p_ids", "r_ids"}}')
        p_ids, r_ids = (_id_list(inputs, key) for key in ("p_ids", "r_ids"))
        if not r_ids:
            raise DataError("the completion is empty", fix="remove the line")
        return Tokenized.of(p_ids, r_ids, eos)
    prompt, completion = (_text(record, key) for key in ("prompt", "completion"))
    return tokenize_text(tokenizer, prompt, completion, eos)


def _text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        near = get_close_matches(key, [k for k in record if k not in _KEYS], n=1)
        raise DataError(
            f"the key {key!r} is missing (there: {', '.join(record) or 'none'})",
            fix=f"did you mean {near[0]!r}? rename it to {key!r}"
            if near
            else 'write {"prompt", "completion"}, {"inputs": {"p_ids", "r_ids"}} or {"messages"}',
        )
    if not isinstance(record[key], str):
        raise DataError(
            f"{key} is a {type(record[key]).__name__}, not text", fix="use a JSON string"
        )
    if key == "completion" and not record[key]:
        raise DataError("the completion is empty", fix="remove the line")
    return str(record[key])


def _id_list(inputs: Mapping[str, Any], key: str) -> list[int]:
    ids = inputs.get(key)
    if not isinstance(ids, list) or any(type(i) is not int for i in ids):
        raise DataError(f"inputs.{key} is no list of whole numbers", fix="give token ids")
    return ids


def _check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise DataError(
                f"token id {token} at position {index} is outside 0..{vocab_size - 1}",
                where=where,
                fix="the data was tokenized for another model",
            )


def _predict(tokenized: Tokenized, masked: Sequence[int]) -> NDArray[np.bool_]:
    """Marks the positions whose next token is learned from."""
    learned = np.asarray(tokenized.learned, dtype=np.bool_)
    if masked:
        learned &= ~np.isin(np.asarray(tokenized.ids), masked)
    predict = np.zeros(len(learned), dtype=np.bool_)
    predict[:-1] = learned[1:]
    return predict


def split_held_out(
    samples: SampleSet, fraction: float, seed: int, most: int | None = None
) -> tuple[SampleSet, SampleSet]:
    """Splits a set by the samples' ids: the same ids are held out whatever else changes.

    Args:
        samples: At least two.
        fraction: Share held out, in (0, 1); at least one sample is, and at least one is not.
        seed: Of the draw.
        most: Hold out no more than this many.

    Raises:
        DataError: There are fewer than two samples, or the fraction is out of range.
    """
    count = len(samples.samples)
    if not 0 < fraction < 1 or count < 2:
        raise DataError(
            f"cannot hold out {fraction} of {count} samples",
            where=str(samples.path),
            fix="give --held-out between 0 and 1, more data, or --eval-data",
        )
    ids = torch.tensor([sample.id for sample in samples.samples])
    draws = counter_uniform(seed, _SPLIT_STREAM, ids)
    held = min(max(1, round(count * fraction)), count - 1, most or count)
    chosen = set(draws.argsort(stable=True)[:held].tolist())
    inside = tuple(s for i, s in enumerate(samples.samples) if i in chosen)
    outside = tuple(s for i, s in enumerate(samples.samples) if i not in chosen)
    held_out = replace(samples, samples=inside, dropped={}, skipped_turns=0)
    return replace(samples, samples=outside), held_out
