"""From text and chats to token ids, with the boundary that generation has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import DataError
from autodeco.files import read_json


@dataclass(frozen=True)
class Tokenized:
    """Token ids and which of them are learned from.

    Attributes:
        ids: Token ids.
        learned: For each token, whether its prediction is in the loss.
    """

    ids: Sequence[int]
    learned: Sequence[bool]

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

    try:
        return AutoTokenizer.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the tokenizer cannot be loaded: {error}",
            where=str(model),
            fix="put the tokenizer's files beside the checkpoint's",
        ) from error


def eos_token_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns every token id that ends an answer, the tokenizer's own first."""
    found: list[int] = []
    if getattr(tokenizer, "eos_token_id", None) is not None:
        found.append(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            ids = read_json(model / name).get("eos_token_id")
            found += [ids] if isinstance(ids, int) else list(ids or ())
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


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenizes an already formatted prompt; a BOS that it spells out is not doubled."""
    bos = getattr(tokenizer, "bos_token", None)
    spelled = bool(bos) and prompt.startswith(str(bos))
    return list(tokenizer(prompt, add_special_tokens=not spelled)["input_ids"])


def tokenize_text(tokenizer: Any, prompt: str, completion: str, eos: Sequence[int]) -> Tokenized:
    """Tokenizes prompt and completion apart, as generation does.

    Tokenizing them together would merge characters across the boundary into tokens that a model
    which was given the prompt can never produce. A tokenizer's own trailing special token (as
    BERT's) is not part of a prompt and is taken off.

    Raises:
        DataError: The prompt or the completion has no token.
    """
    head = tokenize_prompt(tokenizer, prompt)
    while (
        head
        and len(head) > 1
        and head[-1] in eos
        and not _ends_with_token(tokenizer, prompt, head[-1])
    ):
        head.pop()
    tail = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if not tail:
        raise DataError("the completion has no token", fix="remove the line")
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
    template, asked to prompt for it, ends, and it ends with the turn; a template under which that
    is not a prefix of the whole (some take the thoughts out of earlier turns) is learned from
    in its last turn alone.

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

    def render(part: Sequence[Any], prompt: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(
                list(part),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **template_kwargs,
            )
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"the chat template refuses the messages: {error}",
                fix="check roles and --chat-template-kwargs",
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = render(messages, False)
    learned = _generation_mask(tokenizer, messages, tools, template_kwargs, whole)
    if learned is None:
        learned = [False] * len(whole)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn in turns:
            before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
            if whole[: len(before)] == before and whole[: len(after)] == after:
                end = _turn_end(whole, len(before), len(after), eos)
                learned[len(before) : end] = [True] * (end - len(before))
            elif turn == turns[-1]:
                raise DataError(
                    "the chat template renders the last turn differently once it is answered, so "
                    "the assistant's tokens cannot be told apart",
                    fix="use a template with {% generation %} marks, or prompt and completion",
                )
    return Tokenized(whole, learned)


def _turn_end(ids: Sequence[int], start: int, end: int, eos: Sequence[int]) -> int:
    """Leaves out what a template writes after the end-of-turn token (a newline, mostly)."""
    for index in range(end - 1, start - 1, -1):
        if ids[index] in eos:
            return index + 1
    return end


def _generation_mask(
    tokenizer: Any, messages: Any, tools: Any, kwargs: Mapping[str, Any], whole: Sequence[int]
) -> list[bool] | None:
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
    if list(rendered["input_ids"]) != list(whole):
        raise DataError(
            "the chat template renders text and ids differently",
            fix="give prompt and completion instead of messages",
        )
    return [bool(m) for m in rendered["assistant_masks"]]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is no list, or an empty one", fix="give a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {index} has no role", fix='write {"role": ..., "content": ...}'
            )
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"the last message is of {last['role']!r}; there is nothing to learn from",
            fix="end the messages with the assistant's answer",
        )
    if not last.get("content") and not last.get("tool_calls"):
        raise DataError("the completion is empty", fix="remove the line")
