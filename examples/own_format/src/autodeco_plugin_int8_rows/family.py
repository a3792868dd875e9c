"""Qwen2.5's architecture and weight map, with another storage format."""

from autodeco.blocks import embedding, gated_mlp, grouped_attention, layer_norms, output_layer
from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape
from autodeco.recipes import DEBUG
from autodeco.storage import Axis, Part, StorageFormat
from autodeco.weights import WeightMap

INT8_ROWS = StorageFormat(
    name="int8_rows",
    parts={
        "weight": Part("", ("I8",), (Axis(0), Axis(1))),
        "scale": Part("_scale", ("F32",), (Axis(0),)),
    },
    decode="autodeco_plugin_int8_rows.format:decode",
    encode="autodeco_plugin_int8_rows.format:encode",
)

QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    config={
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "quantization_config": {"quant_method": "int8_rows"},
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
    },
    required={"hidden_act": "silu", "use_sliding_window": False},
    megatron={"add_qkv_bias": True},
    stored={r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight": "int8_rows"},
)

FAMILY = FamilySpec(
    id="int8_rows",
    title="Qwen2.5 in eight-bit rows",
    package="autodeco_plugin_int8_rows",
    architectures=(QWEN2,),
    formats=(INT8_ROWS,),
    weight_map=WeightMap(
        rules=(
            *embedding(),
            *layer_norms(),
            *grouped_attention(bias=True),
            *gated_mlp(),
            *output_layer(),
        )
    ),
    presets=(
        ModelPreset(
            name="debug",
            architecture=QWEN2.name,
            shape=ModelShape(3, 96, 6, 2, 16, 160, 1024),
            recipe=DEBUG,
            random=True,
            task="stories",
        ),
    ),
)
