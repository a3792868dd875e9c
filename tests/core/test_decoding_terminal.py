"""Coloured tokens in the terminal."""

from __future__ import annotations

import pytest

from autodeco.decoding.terminal import coloured_tokens, legend, token_style


def test_coloured_tokens() -> None:
    text = coloured_tokens(["a", "\x1b[31mb", "c\n"], [0.0, 1.0, 2.0], [1.0, 0.5, 0.0])
    assert "\x1b" not in text.plain and text.plain.endswith("c\n")
    assert len({str(span.style) for span in text.spans}) == 3
    assert token_style(5.0, 2.0) == token_style(2.0, 1.0)
    assert "T" in legend().plain
    with pytest.raises(ValueError, match="shorter"):
        coloured_tokens(["a", "b"], [1.0], [1.0, 1.0])
