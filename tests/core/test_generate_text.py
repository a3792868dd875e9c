"""The parts of a generated text, token by token."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers_made import byte_bpe

from autodeco.decoding.command import _pieces

TOKENIZER = byte_bpe()


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return str(TOKENIZER.decode(ids))


def whole(tokenizer: Any, ids: list[int]) -> list[str]:
    """What it was: each prefix decoded from its beginning."""
    pieces: list[str] = []
    before = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if text.endswith("\ufffd") and count < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc 123",
        "löß 漢字 🙂🙂 " * 30,
        "a\n\n b" * 40,
        "🙂" * 50,
        "<|im_start|>user\nabc<|im_end|>" * 9,
    ],
)
def test_pieces_are_those_of_the_whole_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert _pieces(TOKENIZER, ids) == whole(TOKENIZER, ids)
    assert "".join(_pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)
    for cut in (1, 2, 3):  # an answer may end within a letter
        assert _pieces(TOKENIZER, ids[:-cut]) == whole(TOKENIZER, ids[:-cut])


def test_bug_the_pieces_of_a_long_answer_took_the_square_of_its_length() -> None:
    tokenizer = Counting()
    ids = TOKENIZER("some words, and é " * 300)["input_ids"]
    began = time.process_time()
    assert "".join(_pieces(tokenizer, ids)) == TOKENIZER.decode(ids)
    assert tokenizer.decoded < 20 * len(ids) and time.process_time() - began < 10
