"""Llama 3.1's architecture, presets, layouts and recipes."""

from autodeco.family import Architecture, FamilySpec, ModelPreset, ModelShape, ParallelLayout
from autodeco.recipes import DEBUG, DEMO, TRAINING
from autodeco_plugin_llama31.weights import WEIGHT_MAP

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    config={
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    required={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
    nemo="nemo.collections.llm.gpt.model.llama:HFLlamaImporter",
)
_EIGHT_B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256)
_PUBLISHED = ParallelLayout(tensor=2, context=2, gpus=32)
_LONG = {**TRAINING, "max_length": 16384}

FAMILY = FamilySpec(
    id="llama31",
    title="Llama 3.1",
    package="autodeco_plugin_llama31",
    aliases=("llama", "llama3", "llama-3.1"),
    architectures=(LLAMA,),
    weight_map=WEIGHT_MAP,
    presets=(
        ModelPreset(
            name="demo",
            architecture=LLAMA.name,
            shape=ModelShape(4, 128, 4, 2, 32, 320, 592),
            recipe=DEMO,
            checkpoint="demo",
            task="stories",
        ),
        ModelPreset(
            name="debug",
            architecture=LLAMA.name,
            shape=ModelShape(3, 96, 6, 2, 16, 160, 1024),
            recipe=DEBUG,
            random=True,
            tokenizer="demo",
            task="stories",
        ),
        ModelPreset(
            name="8b",
            architecture=LLAMA.name,
            shape=_EIGHT_B,
            model_ids=("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
            layout=_PUBLISHED,
            recipe=_LONG,
        ),
        ModelPreset(
            name="nemotron-nano-8b",
            architecture=LLAMA.name,
            shape=_EIGHT_B,
            model_ids=("nvidia/Llama-3.1-Nemotron-Nano-8B-v1",),
            layout=_PUBLISHED,
            recipe=_LONG,
        ),
        ModelPreset(
            name="70b",
            architecture=LLAMA.name,
            shape=ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
            model_ids=("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"),
            layout=ParallelLayout(tensor=4, pipeline=4, gpus=64),
            recipe=TRAINING,
        ),
    ),
)
