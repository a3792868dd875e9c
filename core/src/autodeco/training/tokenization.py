"""From text and chats to token ids, with the boundary that generation has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import DataError, WeightsError
from autodeco.files import fetch_hint, read_object
from autodeco.foreign import is_plain_name


@dataclass(frozen=True)
class Tokenized:
    """Token ids and which of them are learned from.

    Attributes:
        ids: Token ids.
        learned: For each token, whether its prediction is in the loss.
        skipped_turns: Assistant turns that are context only, as the template takes parts of them
            out once the chat goes on.
    """

    ids: Sequence[int]
    learned: Sequence[bool]
    skipped_turns: int = 0

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int], eos: Sequence[int]) -> Tokenized:
        """Joins prompt and completion; the end-of-turn token is appended if it is not there.

        Raises:
            DataError: The prompt is empty: the first token of an answer has nothing before it.
        """
        if not prompt:
            raise DataError(
                "the prompt has no token, so the first token of the completion has no context",
                fix="give a prompt, or begin it with the tokenizer's BOS token",
            )
        end = [eos[0]] if eos and completion[-1] not in eos else []
        return cls(
            [*prompt, *completion, *end],
            [False] * len(prompt) + [True] * (len(completion) + len(end)),
        )


def load_tokenizer(model: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer that lies beside a checkpoint.

    Raises:
        DataError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not model.is_dir():  # else its name would be looked up in the hub's cache
        fix = fetch_hint(model) or "check the path"
        raise DataError("there is no such checkpoint", where=str(model), fix=fix)
    _check_files(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer("a")  # some values of its configuration are looked at only now
    except Exception as error:  # its parsers, one of them not in Python, raise anything
        raise DataError(
            f"the tokenizer cannot be loaded: {error or type(error).__name__}",
            where=str(model),
            fix="put the tokenizer's files beside the checkpoint's",
        ) from error
    # Where only config.json lies, transformers makes up a tokenizer that knows no text.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(
            "there is no tokenizer beside the checkpoint: it has special tokens only",
            where=str(model),
            fix="put the tokenizer's files beside the checkpoint's",
        )
    return tokenizer


def _check_files(model: Path) -> None:
    """Refuses a tokenizer whose configuration names files: they are found by their usual names.

    Raises:
        DataError: It names one outside of the directory.
        WeightsError: The configuration cannot be read.
    """
    path = model / "tokenizer_config.json"
    for key, value in (read_object(path) if path.is_file() else {}).items():
        given = value if isinstance(value, list) else [value]
        if not key.endswith(("_file", "_files")) or not any(given):
            continue
        if not all(is_plain_name(name) for name in given):
            raise DataError(
                f"{key} is {value!r}: a file outside of the directory would be read",
                where=str(path),
                fix="do not use this tokenizer: its configuration is forged or of another machine",
            )


def eos_token_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns every token id that ends an answer, the tokenizer's own first.

    Raises:
        WeightsError: A configuration of the checkpoint cannot be read, or names something else.
    """
    found: list[int] = []
    if getattr(tokenizer, "eos_token_id", None) is not None:
        found.append(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            ids = read_object(model / name).get("eos_token_id")
            listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
            if any(type(i) is not int or abs(i) >= 2**31 for i in listed):
                raise WeightsError(
                    f"eos_token_id is {ids!r}, neither a token id nor a list of them",
                    where=str(model / name),
                    fix="use the file that came with the checkpoint",
                )
            found += listed
    return tuple(dict.fromkeys(found))


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids that the model does not have.

    Raises:
        DataError: Its largest id is not below `vocab_size`.
    """
    ids = tokenizer.get_vocab().values()
    largest = max(ids, default=-1)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer has ids up to {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}",
            where=str(getattr(tokenizer, "name_or_path", "")) or None,
            fix="use the tokenizer that came with the checkpoint",
        )


def tokenize_prompt(tokenizer: Any, prompt: str, eos: Sequence[int] = ()) -> list[int]:
    """Tokenizes an already formatted prompt; a BOS that it spells out is not doubled.

    A tokenizer's own trailing special token (as BERT's), one of `eos`, is taken off.
    """
    bos = getattr(tokenizer, "bos_token", None)
    spelled = bool(bos) and prompt.startswith(str(bos))
    ids = list(tokenizer(prompt, add_special_tokens=not spelled)["input_ids"])
    while len(ids) > 1 and ids[-1] in eos and not _ends_with_token(tokenizer, prompt, ids[-1]):
        ids.pop()
    return ids


def tokenize_text(tokenizer: Any, prompt: str, completion: str, eos: Sequence[int]) -> Tokenized:
    """Tokenizes prompt and completion apart, as generation does.

    Tokenizing them together would merge characters across the boundary into tokens that a model
    which was given the prompt can never produce.

    Raises:
        DataError: The prompt or the completion has no token.
    """
    head = tokenize_prompt(tokenizer, prompt, eos)
    tail = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if not tail:
        raise DataError("the completion has no token", fix="remove the line")
    end = _turn_end(tail, eos)
    if not tokenizer.decode(tail[end:]).strip():
        tail = tail[:end]  # what a template writes behind the end of the turn is not the model's
    return Tokenized.of(head, tail, eos)


def _ends_with_token(tokenizer: Any, text: str, token: int) -> bool:
    return text.rstrip().endswith(str(tokenizer.convert_ids_to_tokens(token)))


def tokenize_chat(
    tokenizer: Any,
    messages: Any,
    tools: Any,
    template_kwargs: Mapping[str, Any],
    eos: Sequence[int],
) -> Tokenized:
    """Renders a chat with the tokenizer's own template; only assistant tokens are learned.

    A template that marks generation is believed. Otherwise each assistant turn begins where the
    template, asked to prompt for it, ends, and it ends with the turn; there the text is cut and
    the parts are tokenized apart, as generation does. A turn under which that is not a prefix of
    the whole (some templates take the thoughts out of earlier turns) is no answer that the model
    would give: it is context, and counted in `Tokenized.skipped_turns`.

    Raises:
        DataError: No template, malformed messages, no assistant turn at the end, or a template
            whose last turn cannot be found.
    """
    _check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, so messages cannot be rendered",
            fix='give {"prompt", "completion"} with the text as the model expects it',
        )

    def render(part: Sequence[Any], prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(part),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **template_kwargs,
                )
            )
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"the chat template refuses the messages: {error}",
                fix="check roles and --chat-template-kwargs",
            ) from error

    whole = render(messages, False)
    marked = _generation_mask(tokenizer, messages, tools, template_kwargs, whole)
    if marked is not None:
        return marked
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers: list[tuple[int, int]] = []
    for turn in turns:
        before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
        if after.startswith(before) and whole.startswith(after):
            answers.append((len(before), len(after)))
        elif turn == turns[-1]:
            raise DataError(
                "the chat template renders the last turn differently once it is answered, so "
                "the assistant's tokens cannot be told apart",
                fix="use a template with {% generation %} marks, or prompt and completion",
            )
    return _tokenize_answers(tokenizer, whole, answers, len(turns) - len(answers), eos)


def _tokenize_answers(
    tokenizer: Any, text: str, answers: Sequence[tuple[int, int]], skipped: int, eos: Sequence[int]
) -> Tokenized:
    """Tokenizes a chat in pieces, cut where answers begin and end (characters of `text`)."""
    ids: list[int] = []
    learned: list[bool] = []
    done = 0
    for start, end in answers:
        context = tokenizer(text[done:start], add_special_tokens=False)["input_ids"]
        answer = tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        count = _turn_end(answer, eos)
        ids += [*context, *answer]
        learned += [False] * len(context) + [i < count for i in range(len(answer))]
        done = end
    rest = tokenizer(text[done:], add_special_tokens=False)["input_ids"] if text[done:] else []
    return Tokenized([*ids, *rest], [*learned, *[False] * len(rest)], skipped)


def _turn_end(ids: Sequence[int], eos: Sequence[int]) -> int:
    """Leaves out what a template writes after the end-of-turn token (a newline, mostly)."""
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in eos:
            return index + 1
    return len(ids)


def _generation_mask(
    tokenizer: Any, messages: Any, tools: Any, kwargs: Mapping[str, Any], whole: str
) -> Tokenized | None:
    if "{% generation" not in str(tokenizer.chat_template).replace("{%-", "{%"):
        return None
    rendered = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **kwargs,
    )
    ids = list(rendered["input_ids"])
    if ids != list(tokenizer(whole, add_special_tokens=False)["input_ids"]):
        raise DataError(
            "the chat template renders text and ids differently",
            fix="give prompt and completion instead of messages",
        )
    return Tokenized(ids, [bool(m) for m in rendered["assistant_masks"]])


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is no list, or an empty one", fix="give a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {index} has no role", fix='write {"role": ..., "content": ...}'
            )
        content = message.get("content")
        if not isinstance(content, (str, list)) and not message.get("tool_calls"):
            raise DataError(
                f"message {index} ({message['role']}) has "
                + ("no content" if content is None else f"a {type(content).__name__} as content"),
                fix='write {"role": ..., "content": "the text"}',
            )
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"the last message is of {last['role']!r}; there is nothing to learn from",
            fix="end the messages with the assistant's answer",
        )
    if not last.get("content") and not last.get("tool_calls"):
        raise DataError("the completion is empty", fix="remove the line")
