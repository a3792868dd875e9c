"""Qwen3's architectures, presets, layouts and recipes."""

from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape, ParallelLayout
from autodeco.recipes import DEBUG, DEMO, TRAINING
from autodeco_plugin_qwen3.weights import WEIGHT_MAP

DENSE = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    config={
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
    },
    required={"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False},
    qk_norm="head",
    nemo="nemo.collections.llm.gpt.model.qwen3:HFQwen3Importer",
)
MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    config={
        **DENSE.config,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    config_keys={
        "ffn_size": "",  # every layer is sparse: config.json has an intermediate_size, unused
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
    },
    required={
        **DENSE.required,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    qk_norm="head",
    nemo="nemo.collections.llm.gpt.model.qwen3:HFQwen3Importer",
)

_VOCABULARY = 151936


def _dense(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    ffn: int,
    layout: ParallelLayout,
    *,
    tied: bool = False,
    more_ids: tuple[str, ...] = (),
) -> ModelPreset:
    size = name.upper()
    return ModelPreset(
        name=name,
        architecture=DENSE.name,
        shape=ModelShape(layers, hidden, heads, 8, 128, ffn, _VOCABULARY, tied),
        model_ids=(f"Qwen/Qwen3-{size}", *more_ids),
        layout=layout,
        recipe=TRAINING,
    )


def _moe(
    name: str,
    ids: tuple[str, ...],
    layers: int,
    hidden: int,
    heads: int,
    expert_ffn: int,
    layout: ParallelLayout,
) -> ModelPreset:
    return ModelPreset(
        name=name,
        architecture=MOE.name,
        shape=ModelShape(layers, hidden, heads, 4, 128, 0, _VOCABULARY, False, 128, 8, expert_ffn),
        model_ids=ids,
        layout=layout,
        recipe=TRAINING,
    )


FAMILY = FamilySpec(
    id="qwen3",
    title="Qwen3, dense and mixture of experts",
    package="autodeco_plugin_qwen3",
    aliases=("qwen3_moe", "qwen-3"),
    architectures=(DENSE, MOE),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="demo",
            architecture=DENSE.name,
            shape=ModelShape(4, 128, 4, 2, 32, 320, 592, True),
            recipe=DEMO,
            checkpoint="demo",
            task="stories",
        ),
        ModelPreset(
            name="debug",
            architecture=DENSE.name,
            shape=ModelShape(3, 64, 6, 2, 24, 96, 1024, True),
            recipe=DEBUG,
            random=True,
            tokenizer="demo",
            task="stories",
        ),
        ModelPreset(
            name="debug-moe",
            architecture=MOE.name,
            shape=ModelShape(2, 64, 4, 2, 24, 0, 1024, False, 8, 2, 48),
            recipe=DEBUG,
            random=True,
            tokenizer="demo",
            task="stories",
        ),
        _dense("0.6b", 28, 1024, 16, 3072, ParallelLayout(gpus=1), tied=True),
        _dense("1.7b", 28, 2048, 16, 6144, ParallelLayout(gpus=1), tied=True),
        _dense(
            "4b",
            36,
            2560,
            32,
            9728,
            ParallelLayout(gpus=1),
            tied=True,
            more_ids=("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        ),
        _dense("8b", 36, 4096, 32, 12288, ParallelLayout(gpus=8)),
        _dense("14b", 40, 5120, 40, 17408, ParallelLayout(tensor=2, gpus=8)),
        _dense("32b", 64, 5120, 64, 25600, ParallelLayout(tensor=2, pipeline=2, gpus=16)),
        _moe(
            "30b-a3b",
            (
                "Qwen/Qwen3-30B-A3B",
                "Qwen/Qwen3-30B-A3B-Instruct-2507",
                "Qwen/Qwen3-30B-A3B-Thinking-2507",
            ),
            48,
            2048,
            32,
            768,
            ParallelLayout(expert=8, gpus=64),
        ),
        _moe(
            "235b-a22b",
            (
                "Qwen/Qwen3-235B-A22B",
                "Qwen/Qwen3-235B-A22B-Instruct-2507",
                "Qwen/Qwen3-235B-A22B-Thinking-2507",
            ),
            94,
            4096,
            64,
            1536,
            ParallelLayout(
                pipeline=8, expert=8, first_stage_layers=18, last_stage_layers=10, gpus=64
            ),
        ),
    ),
)
