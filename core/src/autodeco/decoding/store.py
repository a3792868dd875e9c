"""answers.jsonl: every answer of an evaluation, written as soon as it ended.

The first line says what the answers depend on; a file of other heads, problems or settings begins
anew. A killed evaluation goes on from here, and the file stays for whoever wants to read answers.
Numbers are written so that reading gives back the same float32, bit by bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.sampler import Answer, Key
from autodeco.errors import UsageError
from autodeco.files import atomic_write_text, write_problem
from autodeco.heads.modules import DecodingHeads

ANSWERS = "answers.jsonl"
_FORMAT = 1
_ROWS = "rows_at_once"  # in the first line, but no part of what must match


def answers_header(
    model: Any,
    heads: DecodingHeads | None,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[DecodingPolicy],
    **options: Any,
) -> dict[str, Any]:
    """What the answers of an evaluation depend on, as plain values.

    Args:
        model: the language model; its config and some values of each tensor count.
        heads: None where there are none.
        prompts: token ids of each.
        policies: of the first pass; the mean shift follows from it.
        **options: seed, max_new_tokens, eos_ids.

    Raises:
        UsageError: two policies have the same name.
    """
    twice = [name for name, count in Counter(p.name for p in policies).items() if count > 1]
    if twice:
        raise UsageError(
            f"two settings are called {twice[0]!r}", fix="give each policy a name of its own"
        )
    own = [] if heads is None else list(heads.state_dict().items())
    return {
        "format": _FORMAT,
        "model": _digest([repr(model.config.to_dict()), str(model.dtype), _some_values(model)]),
        "heads": _digest([part for name, x in own for part in (name, x.cpu().numpy().tobytes())]),
        "problems": _digest([str(list(prompt)) for prompt in prompts]),
        "policies": [asdict(policy) for policy in policies],
        **options,
    }


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _some_values(model: Any) -> bytes:
    """The first values of each tensor: hashing all of a large model would take too long."""
    tensors = [p for _, p in sorted(model.named_parameters()) if p.device.type != "meta"]
    first = [p.detach().flatten()[:8].float().to(model.device) for p in tensors]
    return torch.cat(first).cpu().numpy().tobytes() if first else b""


class AnswerLog:
    """Reads what an earlier evaluation left, and appends answers.

    A line that cannot be read, as the torn last one after a kill, is passed over: its answer is
    sampled again.

    Args:
        path: of the file.
        header: of :func:`answers_header`; if the file has another one it begins anew.
        rows_at_once: answers in a batch. None takes over what the file was begun with.
        default_rows: where there is neither.

    Attributes:
        rows_at_once: the answers in a batch that hold.

    Raises:
        EnvironmentProblem: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        rows_at_once: int | None,
        default_rows: int,
    ) -> None:
        self._path = path
        self._found: dict[tuple[str, int, int], Answer] = {}
        before, lines = self._read(header)
        self.rows_at_once = rows_at_once or before or default_rows
        first = json.dumps({**header, _ROWS: self.rows_at_once}, ensure_ascii=False)
        atomic_write_text(path, "".join(f"{line}\n" for line in (first, *lines)))
        try:
            self._stream = path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_problem(error, path) from error

    def __len__(self) -> int:
        """How many answers there are."""
        return len(self._found)

    def _read(self, header: Mapping[str, Any]) -> tuple[int | None, list[str]]:
        """Takes over what can be used; returns its rows at once and its lines."""
        try:
            first, *lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
            found = json.loads(first)
            rows = found.pop(_ROWS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None, []  # none of ours
        if found != json.loads(json.dumps(header)) or type(rows) is not int or rows < 1:
            return None, []
        kept = []
        for line in lines:
            with contextlib.suppress(
                ValueError, KeyError, TypeError, OverflowError, RecursionError
            ):
                setting, answer = _answer(json.loads(line))
                self._found[setting, answer.prompt, answer.sample] = answer
                kept.append(line)
        return rows, kept

    def known(self, policies: Sequence[DecodingPolicy]) -> dict[Key, Answer]:
        """The answers under these policies, numbered as they are here."""
        numbers = {policy.name: number for number, policy in enumerate(policies)}
        return {
            (prompt, numbers[setting], sample): replace(answer, policy=numbers[setting])
            for (setting, prompt, sample), answer in self._found.items()
            if setting in numbers
        }

    def add(self, setting: str, answer: Answer, text: str) -> None:
        """Appends one answer.

        Args:
            setting: the policy's name.
            answer: what was sampled.
            text: the same, for people.

        Raises:
            EnvironmentProblem: It cannot be written.
        """
        line = {
            "setting": setting,
            "problem": answer.prompt,
            "sample": answer.sample,
            "finished": answer.finished,
            "entropy": answer.entropy,
            "text": text,
            "ids": answer.ids.tolist(),
            "temperature": _plain(answer.temperature),
            "top_p": _plain(answer.top_p),
        }
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            raise write_problem(error, self._path) from error

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # what could not be flushed was reported by `add`
            self._stream.close()


def _plain(values: NDArray[np.float32] | None) -> list[float] | None:
    """Nine digits tell any two float32 apart."""
    return None if values is None else [float(f"{value:.9g}") for value in values.tolist()]


def _answer(line: Mapping[str, Any]) -> tuple[str, Answer]:
    def float32(values: Any) -> NDArray[np.float32] | None:
        return None if values is None else np.array(values, dtype=np.float32)

    answer = Answer(
        int(line["problem"]),
        0,
        int(line["sample"]),
        np.array(line["ids"], dtype=np.int32),
        float32(line["temperature"]),
        float32(line["top_p"]),
        float(line["entropy"]),
        bool(line["finished"]),
    )
    return str(line["setting"]), answer
