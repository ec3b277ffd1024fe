"""Tiny random checkpoints, one or more per supported architecture, with numbers that are awkward on purpose.

Heads of 10 or 14 dimensions that are not hidden / heads, 9 query over 3 key heads, odd vocabularies, windows shorter than
the prompts, every kind of rope scaling, biases, tied and untied embeddings. No tokenizer comes with them.
torch is imported where it is needed only, so that tests of configs run without it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 10}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _llama3_rope() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def _yarn_rope() -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _longrope() -> dict[str, Any]:
    """For heads of 16, three quarters of which are rotated: 6 frequencies."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
    }


def _phi3_longrope() -> Phi3Config:
    sizes = {**_SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    return Phi3Config(**sizes, rope_parameters=_longrope(), original_max_position_embeddings=64)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, **_HEADS),
    "llama3-tied-biased": lambda: LlamaConfig(
        **_SIZES,
        **_HEADS,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=_llama3_rope(),
    ),
    "llama-linear": lambda: LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
    ),
    "llama-yarn": lambda: LlamaConfig(**_SIZES, head_dim=14, rope_parameters=_yarn_rope()),
    "mistral": lambda: MistralConfig(**_SIZES, **_HEADS, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2-windows": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=14),
    "qwen3-biased": lambda: Qwen3Config(
        **_SIZES, head_dim=14, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        head_dim=14,
        query_pre_attn_scalar=23,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **(_SIZES | {"num_hidden_layers": 3}),
        head_dim=14,
        query_pre_attn_scalar=23,
        sliding_window=5,
        layer_types=[_SLIDING, _SLIDING, _FULL],
        rope_parameters={
            _FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "phi3": lambda: Phi3Config(**_SIZES, sliding_window=9),
    "phi3-longrope": _phi3_longrope,
    "mixtral": lambda: MixtralConfig(**_SIZES, **_HEADS, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SIZES,
        head_dim=14,
        moe_intermediate_size=22,
        num_experts=7,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        decoder_sparse_step=1,
    ),
    "qwen3-moe-normed": lambda: Qwen3MoeConfig(
        **_SIZES, head_dim=14, moe_intermediate_size=22, num_experts=4, num_experts_per_tok=4, norm_topk_prob=True
    ),
}


def make_checkpoint(name: str, folder: Path, seed: int, **save_options: Any) -> Path:
    """Writes the named tiny model with random float32 weights into `folder`, as transformers saves it; returns `folder`.

    Every parameter is random, biases and norms too, so that none can be left out unnoticed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(TINY[name](), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder, **save_options)
    return folder


def load_in_transformers(folder: Path) -> Any:
    """The checkpoint as a torch module in float32, with plain attention (other kinds leave out soft caps) and plain
    experts (others want strides that are multiples of 16 bytes)."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def transformers_logprobs(folder: Path, token_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [T, V] after every token of one sequence, by transformers."""
    import torch

    model = load_in_transformers(folder)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    return np.asarray(torch.log_softmax(logits.float(), dim=-1).numpy())
