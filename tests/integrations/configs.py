"""Small random models: one of each family, and of each kind of attention that a family has."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

MODELS = Path(__file__).parents[2] / "kvprism-tiny" / "src" / "kvprism_tiny"
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
    # Attention far from uniform, so that a dropped token shows, and yet rounding stays near 1e-5.
    "initializer_range": 0.15,
}
# Wavelengths of 6 to 20,000 positions around 16 and 64: some pairs are left, some are scaled.
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = 24  # well below the prompts of these tests


def config_of(name: str, window: int = WINDOW, width: int = 48, channels: int = 16) -> Any:
    """width: `hidden_size`; channels: per head, where the family names them apart."""
    shape = SHAPE | {"hidden_size": width}
    match name:
        case "llama":
            return transformers.LlamaConfig(**shape, head_dim=channels)
        case "llama-3.1":
            return transformers.LlamaConfig(**shape, head_dim=channels, rope_parameters=LLAMA_3_1)
        case "mistral":
            return transformers.MistralConfig(**shape, sliding_window=None)
        case "mistral-sliding":
            return transformers.MistralConfig(**shape, sliding_window=window)
        case "qwen2":
            return transformers.Qwen2Config(**shape)
        case "qwen2-sliding":  # the first layer attends to everything, the others do not
            sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
            return transformers.Qwen2Config(**shape, **sliding)
        case "qwen3":
            return transformers.Qwen3Config(**shape, head_dim=channels, tie_word_embeddings=True)
        case "gemma2":  # the first and the last layer have the window
            return transformers.Gemma2Config(
                **shape,
                head_dim=channels,
                query_pre_attn_scalar=12,
                sliding_window=window,
                attn_logit_softcapping=4.0,
                final_logit_softcapping=6.0,
            )
    raise KeyError(name)


FULL = ["llama", "llama-3.1", "mistral", "qwen2", "qwen3"]
SLIDING = ["mistral-sliding", "qwen2-sliding", "gemma2"]
CONFIGS = {name: config_of(name) for name in FULL + SLIDING} | {
    "qwen3": config_of("qwen3", channels=12)
}


def save_random(config: transformers.PreTrainedConfig, folder: Path) -> Path:
    """A checkpoint with random weights (norms and biases too, seed 0), the tokenizer of `tiny`."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # Gemma's are counted from 1
            low, high = (-0.5, 0.5) if config.model_type == "gemma2" else (0.5, 1.5)
            torch.nn.init.uniform_(parameter, low, high)
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    for file in (MODELS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
