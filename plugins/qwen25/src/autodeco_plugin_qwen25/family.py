"""Qwen2.5's architecture, presets, layouts and recipes."""

from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape, ParallelLayout
from autodeco.recipes import DEBUG, DEMO, TRAINING
from autodeco_plugin_qwen25.weights import WEIGHT_MAP

QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    config={
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
    },
    required={"hidden_act": "silu", "use_sliding_window": False},
    megatron={"add_qkv_bias": True},
    nemo="nemo.collections.llm.gpt.model.qwen2:HFQwen2Importer",
)
_DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-Qwen-"


def _preset(
    size: str,
    shape: tuple[int, int, int, int, int],
    layout: ParallelLayout,
    *,
    tied: bool = False,
    vocabulary: int = 152064,
    more_ids: tuple[str, ...] = (),
    max_length: int = TRAINING["max_length"],
) -> ModelPreset:
    """Makes a preset of (layers, width, heads, key-value heads, inner width)."""
    layers, width, heads, groups, inner = shape
    name = size.upper()
    return ModelPreset(
        name=size,
        architecture=QWEN2.name,
        shape=ModelShape(layers, width, heads, groups, width // heads, inner, vocabulary, tied),
        model_ids=(f"Qwen/Qwen2.5-{name}", f"Qwen/Qwen2.5-{name}-Instruct", *more_ids),
        layout=layout,
        recipe={**TRAINING, "max_length": max_length},
    )


FAMILY = FamilySpec(
    id="qwen25",
    title="Qwen2.5",
    package="autodeco_plugin_qwen25",
    aliases=("qwen2", "qwen2.5", "qwen-2.5"),
    architectures=(QWEN2,),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="demo",
            architecture=QWEN2.name,
            shape=ModelShape(4, 128, 4, 2, 32, 320, 1643, True),
            recipe=DEMO,
            checkpoint="demo",
            task="stories",
        ),
        ModelPreset(
            name="debug",
            architecture=QWEN2.name,
            shape=ModelShape(3, 96, 6, 2, 16, 160, 2048, True),
            recipe=DEBUG,
            random=True,
            tokenizer="demo",
            task="stories",
        ),
        _preset(
            *("0.5b", (24, 896, 14, 2, 4864), ParallelLayout(gpus=1)),
            tied=True,
            vocabulary=151936,
        ),
        _preset(
            *("1.5b", (28, 1536, 12, 2, 8960), ParallelLayout(gpus=1)),
            tied=True,
            vocabulary=151936,
        ),
        _preset(
            *("3b", (36, 2048, 16, 2, 11008), ParallelLayout(gpus=1)),
            tied=True,
            vocabulary=151936,
        ),
        _preset(
            *("7b", (28, 3584, 28, 4, 18944), ParallelLayout(tensor=2, context=2, gpus=32)),
            more_ids=(_DISTILLED + "7B",),
            max_length=16384,
        ),
        _preset(
            *("14b", (48, 5120, 40, 8, 13824), ParallelLayout(tensor=2, gpus=8)),
            more_ids=(_DISTILLED + "14B",),
        ),
        _preset(
            *("32b", (64, 5120, 40, 8, 27648), ParallelLayout(tensor=2, pipeline=2, gpus=16)),
            more_ids=(_DISTILLED + "32B",),
        ),
        _preset("72b", (80, 8192, 64, 8, 29568), ParallelLayout(tensor=4, pipeline=4, gpus=64)),
    ),
)
