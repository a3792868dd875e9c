"""Mixtral's architecture and presets."""

from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape, ParallelLayout
from autodeco.recipes import DEBUG, TRAINING

from autodeco_plugin_mixtral.weights import WEIGHT_MAP

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    config={
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
    },
    config_keys={
        "ffn_size": "",  # intermediate_size is an expert's
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
    required={"hidden_act": "silu", "sliding_window": None},
)

FAMILY = FamilySpec(
    id="mixtral",
    title="Mixtral, mixture of experts",
    package="autodeco_plugin_mixtral",
    architectures=(MIXTRAL,),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="debug",
            architecture=MIXTRAL.name,
            shape=ModelShape(3, 96, 6, 2, 32, 0, 1024, False, 8, 2, 128),
            recipe=DEBUG,
            random=True,
            task="stories",
        ),
        ModelPreset(
            name="8x7b",
            architecture=MIXTRAL.name,
            shape=ModelShape(32, 4096, 32, 8, 128, 0, 32000, False, 8, 2, 14336),
            model_ids=("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
            layout=ParallelLayout(expert=8, gpus=8),
            recipe=TRAINING,
        ),
    ),
)
