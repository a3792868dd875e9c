"""Small real tokenizers for the tests of data, made with the `tokenizers` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, START, END = "<s>", "<eos>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, EOS, START, END, "<think>", "</think>")
MERGES = ("a b", "b c", "ab c", "Ċ Ċ", "1 2", "12 3")

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# As Qwen3's: what was thought in earlier turns is taken out, and an empty thought stands for none.
THINKING = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{%- endif -%}"
    "{{ m.content + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think></think>' }}{%- endif -%}{%- endif -%}"
)
EFFORT = "{{ '<|im_start|>system\neffort ' + reasoning_effort + '<|im_end|>' }}" + CHATML
MARKED = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}{{ '\n' }}"
    "{%- endfor -%}"
)


def byte_bpe(*, bos: bool = False, trailing_eos: bool = False, template: str | None = None) -> Any:
    """A byte-level BPE tokenizer whose merges join "abc", "123" and two newlines.

    Args:
        bos: Whether it begins a text with BOS, as Llama's.
        trailing_eos: Whether it ends a text with EOS.
        template: Its chat template.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]
    backend = Tokenizer(
        models.BPE(
            {word: row for row, word in enumerate(words)}, [tuple(m.split()) for m in MERGES]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos or trailing_eos:
        parts = [*([BOS] if bos else []), "$A", *([EOS] if trailing_eos else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(parts),
            special_tokens=[(token, words.index(token)) for token in (BOS, EOS)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def words_of(tokenizer: Any, ids: Any) -> list[str]:
    """The text of each token."""
    return [tokenizer.decode([int(token)]) for token in ids]


def write_lines(path: Path, *lines: str | bytes) -> Path:
    """Writes a file of these lines."""
    raw = (line if isinstance(line, bytes) else line.encode() for line in lines)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path
