"""OLMo 2's architecture and presets."""

from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape, ParallelLayout
from autodeco.recipes import DEBUG, TRAINING

from autodeco_plugin_olmo2.weights import WEIGHT_MAP

OLMO2 = Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    config={
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
    required={"attention_bias": False, "hidden_act": "silu"},
    norms="behind",
    qk_norm="all_heads",
)

FAMILY = FamilySpec(
    id="olmo2",
    title="OLMo 2",
    package="autodeco_plugin_olmo2",
    architectures=(OLMO2,),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="debug",
            architecture=OLMO2.name,
            shape=ModelShape(3, 96, 6, 2, 32, 352, 1024),
            recipe=DEBUG,
            random=True,
            task="stories",
        ),
        ModelPreset(
            name="7b",
            architecture=OLMO2.name,
            shape=ModelShape(32, 4096, 32, 32, 128, 11008, 100352),
            model_ids=("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-Instruct"),
            layout=ParallelLayout(gpus=8),
            recipe=TRAINING,
        ),
    ),
)
