"""The tokenizer of the built-in stories, for random checkpoints whose plugin brings none."""

from __future__ import annotations

from pathlib import Path

from autodeco import stories

_SPECIAL = ("<|endoftext|>", "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
_ROLES = ("system", "user", "assistant")
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def write_story_tokenizer(directory: Path, vocab_size: int) -> dict[str, int]:
    """Writes a tokenizer with a token for each word, digit and mark of the stories.

    Args:
        directory: Its files appear here.
        vocab_size: Rows of the model's embedding; where they are too few nothing is written.

    Returns:
        The keys of ``config.json`` that name its special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*_SPECIAL, *_ROLES, *stories.vocabulary()]
    if len(tokens) > vocab_size:
        return {}
    rows = {token: row for row, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(rows, unk_token=_SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(stories.TOKEN_PATTERN), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[1],
        unk_token=_SPECIAL[2],
        extra_special_tokens=list(_SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return {"eos_token_id": rows[_SPECIAL[0]], "pad_token_id": rows[_SPECIAL[1]]}
