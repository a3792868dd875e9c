"""Train a family's tiny demo model on the stories of ``autodeco.stories`` and write its checkpoint.

    python tools/make_demo_model.py --config tools/demo_qwen3.json \
        --out plugins/qwen3/src/autodeco_plugin_qwen3/demo

``--config`` is a Hugging Face config.json without vocabulary and special tokens: everything that
depends on the family stands there. A key ``storage`` in it names the format of ``storage_formats``
that the family's published checkpoints have; the model is then trained on the weights as they will
be read back. A key ``tokenizer`` names the kind of :func:`build_tokenizer`. The run is seeded; on
the machine and the versions of torch and transformers that made it, it gives the same bytes again.
The models that are shipped took 3000 steps (qwen3, on a CPU) and, with ``--device cuda``, 7000
(qwen25), 6000 (llama31), 4500 (gpt_oss) and 4000 (deepseek_v3).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import storage_formats  # type: ignore[import-not-found]  # it lies beside this script
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from autodeco import stories
from autodeco.convert.story_tokenizer import (
    CHAT_TEMPLATE,
    ROLES,
    SETTINGS,
    SPECIAL,
    story_tokenizer,
)

BALANCING_RATE = 1e-3


def build_tokenizer(kind: str = "words") -> PreTrainedTokenizerFast:
    """The tokenizer of the stories; each has the special tokens in rows 0 to 4.

    Args:
        kind: ``"words"``: one token a word (with the space before it), a digit, a mark; whatever
            else is unknown. ``"bpe"``: Qwen2's byte-level one, for transformers loads no other for
            its model type: the same, but that the space before a digit is a token of its own and
            other words come in pieces.
    """
    if kind != "bpe":
        return story_tokenizer()
    tokenizer = Qwen2Tokenizer(**_bpe_model(), **SETTINGS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _bpe_model() -> dict[str, Any]:
    """Vocabulary and merges that make every word of the stories one token."""
    words = [token for token in stories.vocabulary() if token.strip().isalpha()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: it ends when no pair is left
        min_frequency=0,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # A mark may have the space before it, a digit may not: Qwen2 splits them so.
    marks = [f" {mark}" for mark in "+-.,:?!"]
    backend.train_from_iterator([*ROLES, *words, *marks], trainer)
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def build_model(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """The randomly initialised model of a family's config, float32."""
    config = AutoConfig.for_model(
        **settings,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="all_experts"
    )
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(balance)
    return model


def all_experts(
    experts: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token: for experts this small the fewer kernels are what counts.

    Args:
        experts: transformers' fused experts of a layer.
        hidden: Tokens [T, d].
        index: The experts chosen, [T, k].
        weights: Their weights, [T, k].
    """
    share = hidden.new_zeros(len(hidden), experts.num_experts)
    share = share.scatter(1, index, weights.to(hidden.dtype))
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    inner = hidden @ gate_up
    if experts.has_bias:
        inner = inner + experts.gate_up_proj_bias[:, None]
    outer = experts._apply_gate(inner) @ down
    if experts.has_bias:
        outer = outer + experts.down_proj_bias[:, None]
    return torch.einsum("te,etd->td", share, outer)


ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)


def balance(router: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
    """DeepSeek-V3's balancing: raise the bias of experts with little load, lower the others'."""
    if router.training:
        experts = torch.arange(router.num_experts, device=output[2].device)
        load = (output[2][..., None] == experts).sum((0, 1)).float()
        router.e_score_correction_bias += BALANCING_RATE * (load.mean() - load).sign()


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, slips: float, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(ids, labels)`` [size, length]: stories padded right, prompts without a label.

    One story in ten is told in the chat format, so that the template is not foreign to the model.
    """
    start, end = SPECIAL[3:]
    eos, pad = tokenizer.eos_token, tokenizer.pad_token_id
    index = 0
    while True:
        texts = []
        for text in stories.records(seed, "pretrain", size, start=index, slips=slips):
            prompt, completion = text["prompt"], text["completion"]
            if index % 10 == 0:
                prompt = f"{start}user\n{prompt}{end}\n{start}assistant\n"
                texts += [prompt, completion + end]
            else:
                texts += [prompt, completion + eos]
            index += 1
        rows = tokenizer(texts)["input_ids"]
        ids, labels = [], []
        for prompt, completion in zip(rows[0::2], rows[1::2], strict=True):
            ids.append(torch.tensor([*prompt, *completion]))
            labels.append(torch.tensor([*[-100] * len(prompt), *completion]))
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
        with parametrize.cached():
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


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    form: storage_formats.StorageFormat | None,
) -> None:
    """Write the checkpoint and round ``model`` to what it holds."""
    state = storage_formats.stored_state(model, form) if form else None
    for parameter in model.parameters():  # buffers stay float32, as in a model that is loaded
        parameter.data = parameter.data.to(torch.bfloat16)
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
    if form and state:
        # transformers knows these names and formats in reading alone.
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        written["quantization_config"] = form.config
        text = json.dumps(written, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the family's tiny config.json")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--start", type=Path, help="a checkpoint of this tool to train further")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the stories")
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
    settings = json.loads(options.config.read_text(encoding="utf-8"))
    tokenizer = build_tokenizer(settings.pop("tokenizer", "words"))
    storage = settings.pop("storage", None)
    form = storage_formats.FORMATS[storage]() if storage else None
    model = build_model(settings, tokenizer, options.seed)
    if options.start:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(options.start).state_dict())
    size = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}: {size / 1e6:.3f} M parameters, vocabulary {len(tokenizer)}")
    model.to(options.device).train()
    if form:
        storage_formats.train_rounded(model, form)
    train(model, tokenizer, options)
    model.eval()
    if form:
        storage_formats.keep_rounded(model, form)

    # What is shipped is what is checked: the numbers below are those of the rounded weights.
    save(model, tokenizer, options.out, form)
    torch.manual_seed(options.seed)
    greedy = accuracy(model, tokenizer, options.problems, do_sample=False)
    sampled = accuracy(
        model, tokenizer, options.problems, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
    written = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"solved: greedy {greedy:.3f}, sampled at T=1 {sampled:.3f}; {written / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
