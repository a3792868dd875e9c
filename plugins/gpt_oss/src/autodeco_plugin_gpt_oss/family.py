"""GPT-OSS's architecture, presets, layouts and recipes."""

from autodeco.family import (
    Architecture,
    FamilySpec,
    FromConfig,
    ModelPreset,
    ModelShape,
    ParallelLayout,
)
from autodeco.recipes import DEBUG, DEMO, TRAINING
from autodeco_plugin_gpt_oss.weights import WEIGHT_MAP

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    model_type="gpt_oss",
    config={
        "attention_bias": True,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        "rms_norm_eps": 1e-5,
        "rope_parameters": _YARN,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    config_keys={
        "ffn_size": "",  # every layer is sparse; intermediate_size is an expert's
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
    required={"attention_bias": True, "hidden_act": "silu"},
    megatron={
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "activation_func": "quick_gelu",  # x * sigmoid(1.702 x)
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": FromConfig("swiglu_limit", 7.0),
        "softmax_type": "learnable",
        "window_size": (FromConfig("sliding_window", plus=-1), 0),
        # by default every other layer, the first one too
        "window_attn_skip_freq": FromConfig("layer_types", 2, equals="sliding_attention"),
    },
    stored={r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj": "mxfp4"},
    nemo="nemo.collections.llm.gpt.model.gpt_oss:HFGPTOSSImporter",
)
_VOCABULARY = 201088

FAMILY = FamilySpec(
    id="gpt_oss",
    title="GPT-OSS, mixture of experts in MXFP4",
    package="autodeco_plugin_gpt_oss",
    aliases=("gpt-oss", "gptoss"),
    architectures=(GPT_OSS,),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="demo",
            architecture=GPT_OSS.name,
            shape=ModelShape(4, 128, 4, 2, 32, 0, 592, False, 8, 2, 96),
            recipe=DEMO,
            checkpoint="demo",
            task="stories",
        ),
        ModelPreset(
            name="debug",
            architecture=GPT_OSS.name,
            shape=ModelShape(3, 64, 6, 2, 16, 0, 1024, False, 8, 2, 96),
            recipe=DEBUG,
            random=True,
            tokenizer="demo",
            task="stories",
            config={
                "rope_parameters": {**_YARN, "original_max_position_embeddings": 64},
                "max_position_embeddings": 2048,
                "sliding_window": 8,
            },
        ),
        ModelPreset(
            name="20b",
            architecture=GPT_OSS.name,
            shape=ModelShape(24, 2880, 64, 8, 64, 0, _VOCABULARY, False, 32, 4, 2880),
            model_ids=("openai/gpt-oss-20b",),
            layout=ParallelLayout(expert=8, gpus=8),
            recipe=TRAINING,
        ),
        ModelPreset(
            name="120b",
            architecture=GPT_OSS.name,
            shape=ModelShape(36, 2880, 64, 8, 64, 0, _VOCABULARY, False, 128, 4, 2880),
            model_ids=("openai/gpt-oss-120b",),
            layout=ParallelLayout(pipeline=4, expert=8, gpus=64),
            recipe=TRAINING,
        ),
    ),
)
