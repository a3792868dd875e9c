"""The tokenizer of the built-in stories: of trained built-in models, and of random ones."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from autodeco import stories

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
#: What a tokenizer of the stories is made with, of whatever class.
SETTINGS = MappingProxyType(
    {
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
        "extra_special_tokens": list(SPECIAL[3:]),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 512,
    }
)


def story_tokens() -> list[str]:
    """Returns every token, in the order of its rows: special ones, roles, the stories' own."""
    return [*SPECIAL, *ROLES, *stories.vocabulary()]


def story_tokenizer() -> Any:
    """Returns a tokenizer with a token for each word (and the space before it), digit and mark.

    Whatever else is unknown.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rows = {token: row for row, token in enumerate(story_tokens())}
    backend = Tokenizer(models.WordLevel(rows, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(stories.TOKEN_PATTERN), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SETTINGS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_story_tokenizer(directory: Path, vocab_size: int) -> dict[str, int]:
    """Writes the tokenizer's files.

    Args:
        directory: They appear here.
        vocab_size: Rows of the model's embedding; where they are too few nothing is written.

    Returns:
        The keys of ``config.json`` that name its special tokens.
    """
    if len(story_tokens()) > vocab_size:
        return {}
    tokenizer = story_tokenizer()
    tokenizer.save_pretrained(directory)
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
