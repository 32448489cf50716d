"""The model families at a size of one's own."""

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def families(**shape) -> dict:
    """The class and the configuration of each family; Llama also with biases, and with heads wide enough for native layers."""
    return {
        "llama": (LlamaForCausalLM, LlamaConfig(**shape)),
        "llama_biased": (
            LlamaForCausalLM,
            LlamaConfig(**shape, attention_bias=True, mlp_bias=True),
        ),
        "llama_native": (LlamaForCausalLM, LlamaConfig(**shape, head_dim=32)),
        "mistral": (MistralForCausalLM, MistralConfig(**shape, sliding_window=None)),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config(**shape)),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**shape, head_dim=16)),
        "mixtral": (MixtralForCausalLM, MixtralConfig(**shape, num_local_experts=4)),
    }
