"""Train a family's tiny demo model on the stories of ``autodeco.stories`` and write its checkpoint.

    python tools/make_demo_model.py --config tools/demo_qwen3.json \
        --out plugins/qwen3/src/autodeco_plugin_qwen3/demo

``--config`` is a Hugging Face config.json without vocabulary and special tokens: everything that
depends on the family stands there. The run is seeded; on the machine and the versions of torch and
transformers that made it, it gives the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from autodeco import stories

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
ROLES = ("system", "user", "assistant")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word (with the space before it), a digit, a mark; whatever else is unknown."""
    vocabulary = [*SPECIAL, *ROLES, *stories.vocabulary()]
    backend = Tokenizer(
        models.WordLevel({token: row for row, token in enumerate(vocabulary)}, unk_token=SPECIAL[2])
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(stories.TOKEN_PATTERN), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        extra_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(config_file: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """The randomly initialised model of a family's config, float32."""
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, slips: float, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(ids, labels)`` [size, length]: stories padded right, prompts without a label.

    One story in ten is told in the chat format, so that the template is not foreign to the model.
    """
    rows = tokenizer.get_vocab()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    start, end = (rows[token] for token in SPECIAL[3:])
    ask = [start, rows["user"], rows["\n"]]
    reply = [end, rows["\n"], start, rows["assistant"], rows["\n"]]
    index = 0
    while True:
        ids, labels = [], []
        for text in stories.records(seed, "pretrain", size, start=index, slips=slips):
            prompt, completion = (
                [rows[token] for token in re.findall(stories.TOKEN_PATTERN, part)]
                for part in (text["prompt"], text["completion"])
            )
            if index % 10 == 0:
                prompt, completion = [*ask, *prompt, *reply], [*completion, end]
            else:
                completion = [*completion, eos]
            ids.append(torch.tensor([*prompt, *completion]))
            labels.append(torch.tensor([*[-100] * len(prompt), *completion]))
            index += 1
        yield (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        )


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def train(model: Any, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
    """AdamW over fresh stories; prints a line every ``--print-every`` steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    digits = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    digits[[row for token, row in tokenizer.get_vocab().items() if token.strip().isdigit()]] = True
    source = batches(tokenizer, options.seed, options.slips, options.batch)
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr, options.warmup)
        ids, labels = (tensor.to(options.device) for tensor in next(source))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        target = labels[:, 1:]
        kept = target >= 0
        losses = torch.nn.functional.cross_entropy(logits[kept], target[kept], reduction="none")
        losses.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % options.print_every == 0 or step + 1 == options.steps:
            is_digit = digits[target[kept].cpu()].to(options.device)
            print(
                f"step {step:5d}  loss {losses.mean():.4f}  digits {losses[is_digit].mean():.4f}  "
                f"words {losses[~is_digit].mean():.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, count: int, **decoding: Any) -> float:
    """Share of held-out problems solved with the given ``generate`` settings."""
    rows = list(stories.problems(0, "heldout", count))
    encoded = tokenizer([row["problem"] for row in rows], return_tensors="pt", padding=True)
    encoded = encoded.to(model.device)
    encoded.pop("token_type_ids", None)
    out = model.generate(**encoded, max_new_tokens=120, **decoding)
    texts = tokenizer.batch_decode(
        out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    solved = [stories.check_answer(text, row["gt"]) for text, row in zip(texts, rows, strict=True)]
    return sum(solved) / count


def save(model: Any, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the checkpoint: bfloat16 safetensors, configs, tokenizer."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the family's tiny config.json")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--slips", type=float, default=0.06, help="share of results stated wrong")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-every", type=int, default=100)
    parser.add_argument("--problems", type=int, default=256, help="problems of the final check")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    model = build_model(options.config, tokenizer, options.seed)
    size = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {size / 1e6:.3f} M parameters, vocabulary {len(tokenizer)}")
    train(model.to(options.device).train(), tokenizer, options)

    # What is shipped is what is checked: the numbers below are those of the rounded weights.
    model.eval().to(torch.bfloat16)
    save(model, tokenizer, options.out)
    torch.manual_seed(options.seed)
    greedy = accuracy(model, tokenizer, options.problems, do_sample=False)
    sampled = accuracy(
        model, tokenizer, options.problems, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
    written = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"solved: greedy {greedy:.3f}, sampled at T=1 {sampled:.3f}; {written / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
