"""From a checkpoint's `config.json` to a `ModelConfig`, one short function per architecture.

To support another one: write a function that returns the fields in which it differs, add it to `_FAMILIES`, and, if its
tensors have other names, extend `quire.models.params`. Whatever is not understood is refused by name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig

from quire.kernels.errors import ModelError, UnsupportedModelError
from quire.models.config import ModelConfig, MoeConfig, RopeConfig

Fields = dict[str, Any]

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_DTYPES = ("float32", "bfloat16", "float16")


def load_config(folder: str | Path, max_model_len: int | None = None) -> ModelConfig:
    """Reads `config.json` (and the stop ids of `generation_config.json`) in a local folder.

    `max_model_len`, in tokens, decides between the two sets of a longrope model (Phi-3, Phi-4): the long factors if it
    exceeds the original context, else the short ones; None means the model's own maximum. transformers decides by the
    longest sequence seen so far, which would change the keys already in a cache; vLLM decides as is done here.

    Raises UnsupportedModelError for what is not implemented, ModelError for a file that is absent or unreadable.
    """
    folder = Path(folder)
    raw = read_config(folder)
    architecture = _architecture(raw, folder)
    return _make_config(
        folder, raw, architecture, lambda: AutoConfig.from_pretrained(folder, local_files_only=True), max_model_len
    )


def make_llama_config(folder: Path, raw: Fields, architecture: str, max_model_len: int | None = None) -> ModelConfig:
    """The config of what is built as Llama is, whatever its architecture is called, from the content of its config.json.

    Raises as `load_config` does.
    """
    return _make_config(folder, raw, architecture, lambda: LlamaConfig.from_dict(raw), max_model_len)


def read_config(folder: Path) -> Fields:
    """The content of a folder's config.json. Raises ModelError as `load_config` does; also where the weights are quantized."""
    raw = _read_json(folder / "config.json")
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{folder} is quantized (quantization_config, method {method!r}), which is not supported; "
            f"use the checkpoint in one of {', '.join(_DTYPES)}"
        )
    return raw


def _make_config(
    folder: Path, raw: Fields, architecture: str, parse: Callable[[], Any], max_model_len: int | None
) -> ModelConfig:
    family = _FAMILIES.get(architecture, _llama)
    try:
        hf = parse()
        fields = _common(hf) | family(hf) | {"architecture": architecture}
        fields |= _rope_fields(hf, fields, max_model_len)
        fields |= {"dtype": _dtype(raw), "eos_token_ids": _eos_token_ids(folder, raw, hf)}
        return ModelConfig(**fields)
    except (ValueError, KeyError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'} does not describe a {architecture}: {said}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; a model folder needs config.json and *.safetensors") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def _architecture(raw: dict[str, Any], folder: Path) -> str:
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in _FAMILIES:
            return str(architecture)
    what = ", ".join(named) if named else f"unnamed (model_type {raw.get('model_type')!r})"
    raise UnsupportedModelError(
        f"architecture {what} of {folder} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _common(hf: Any) -> Fields:
    num_layers = hf.num_hidden_layers
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": num_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": hf.intermediate_size,
        "max_position_embeddings": hf.max_position_embeddings,
        "attention_scale": head_dim**-0.5,
        "sliding_windows": (None,) * num_layers,
        "norm_eps": hf.rms_norm_eps,
        "activation": _activation(getattr(hf, "hidden_act", None) or hf.hidden_activation),
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "bos_token_id": hf.bos_token_id,
    }


def _llama(hf: Any) -> Fields:
    return {"qkv_bias": hf.attention_bias, "o_bias": hf.attention_bias, "mlp_bias": hf.mlp_bias}


def _mistral(hf: Any) -> Fields:
    return {"sliding_windows": _one_window(hf)}


def _qwen2(hf: Any) -> Fields:
    return {"qkv_bias": True, "sliding_windows": _windows_by_type(hf)}


def _qwen3(hf: Any) -> Fields:
    bias = hf.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_windows": _windows_by_type(hf)}


def _qwen3_moe(hf: Any) -> Fields:
    fields = _qwen3_moe_sparsity(hf)
    bias = hf.attention_bias
    return fields | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "sliding_windows": _one_window(hf)}


def _qwen3_moe_sparsity(hf: Any) -> Fields:
    step, dense = hf.decoder_sparse_step, set(hf.mlp_only_layers or ())
    sparse = [idx not in dense and hf.num_experts > 0 and (idx + 1) % step == 0 for idx in range(hf.num_hidden_layers)]
    if not any(sparse):
        return {}
    if not all(sparse):
        raise UnsupportedModelError(
            "Qwen3MoeForCausalLM with experts in some layers only is not supported "
            f"(decoder_sparse_step={step}, mlp_only_layers={sorted(dense)}); all layers must have experts, or none"
        )
    return {
        "moe": MoeConfig(
            num_experts=hf.num_experts,
            num_experts_per_tok=hf.num_experts_per_tok,
            intermediate_size=hf.moe_intermediate_size,
            norm_topk_prob=hf.norm_topk_prob,
        )
    }


def _mixtral(hf: Any) -> Fields:
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        num_experts_per_tok=hf.num_experts_per_tok,
        intermediate_size=hf.intermediate_size,
    )
    return {"moe": moe, "sliding_windows": _one_window(hf)}


def _gemma2(hf: Any) -> Fields:
    if getattr(hf, "use_bidirectional_attention", None):
        raise UnsupportedModelError("use_bidirectional_attention is not supported: this engine generates causally")
    return {
        "attention_scale": hf.query_pre_attn_scalar**-0.5,
        "attention_soft_cap": hf.attn_logit_softcapping,
        "final_soft_cap": hf.final_logit_softcapping,
        "sliding_windows": _windows_by_type(hf),
        "norm_unit_offset": True,
        "activation": _activation(hf.hidden_activation),
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "post_norms": True,
        "embedding_scale": math.sqrt(hf.hidden_size),
    }


def _gemma3(hf: Any) -> Fields:
    return _gemma2(hf) | {"qk_norm": True}


def _phi3(hf: Any) -> Fields:
    return {"fused_projections": True, "sliding_windows": _one_window(hf)}


_FAMILIES: dict[str, Callable[[Any], Fields]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(_FAMILIES)


def _one_window(hf: Any) -> tuple[int | None, ...]:
    window: int | None = hf.sliding_window
    return (window,) * int(hf.num_hidden_layers)


def _windows_by_type(hf: Any) -> tuple[int | None, ...]:
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _dtype(raw: dict[str, Any]) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"checkpoint dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}")
    return dtype


def _eos_token_ids(folder: Path, raw: dict[str, Any], hf: Any) -> tuple[int, ...]:
    """The ids that end a sequence: generation_config.json's if it names any, since chat models add theirs there."""
    path = folder / "generation_config.json"
    eos = _read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        eos = raw.get("eos_token_id", hf.eos_token_id)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)


def _rope_fields(hf: Any, fields: Fields, max_model_len: int | None) -> Fields:
    """One rope for all layers, or one per layer type where the config has several (Gemma 3)."""
    settings = _rope_settings(hf)
    if "rope_theta" in settings:
        return {"ropes": (_rope(settings, hf, fields, max_model_len),), "rope_indices": (0,) * hf.num_hidden_layers}
    kinds = sorted(set(hf.layer_types))
    ropes = tuple(_rope(settings[kind], hf, fields, max_model_len) for kind in kinds)
    return {"ropes": ropes, "rope_indices": tuple(kinds.index(kind) for kind in hf.layer_types)}


def _rope_settings(hf: Any) -> Fields:
    settings = getattr(hf, "rope_parameters", None)
    if settings:
        return dict(settings)
    # transformers 4 keeps the pieces at the top level.
    scaling = getattr(hf, "rope_scaling", None) or {}
    whole = {"rope_theta": hf.rope_theta, "partial_rotary_factor": getattr(hf, "partial_rotary_factor", 1.0), **scaling}
    if getattr(hf, "rope_local_base_freq", None) is None:
        return whole
    return {"full_attention": whole, "sliding_attention": {"rope_theta": hf.rope_local_base_freq}}


def _rope(settings: Fields, hf: Any, fields: Fields, max_model_len: int | None) -> RopeConfig:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in _ROPE_NUMBERS:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; supported are {', '.join(_ROPE_NUMBERS)}")
    original = getattr(hf, "original_max_position_embeddings", None) or settings.get("original_max_position_embeddings")
    numbers = _ROPE_NUMBERS[kind](settings, hf, original or hf.max_position_embeddings, max_model_len)
    return RopeConfig(
        theta=float(settings["rope_theta"]),
        rotary_dim=int(fields["head_dim"] * settings.get("partial_rotary_factor", 1.0)),
        scaling=kind,
        **numbers,
    )


def _no_scaling(_settings: Fields, _hf: Any, _original: int, _max_model_len: int | None) -> Fields:
    return {}


def _linear(settings: Fields, _hf: Any, _original: int, _max_model_len: int | None) -> Fields:
    return {"factor": float(settings["factor"])}


def _llama3(settings: Fields, _hf: Any, original: int, _max_model_len: int | None) -> Fields:
    numbers = {name: float(settings[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return {**numbers, "original_max_position_embeddings": original}


def _longrope(settings: Fields, hf: Any, original: int, max_model_len: int | None) -> Fields:
    """LongRoPE, Ding et al. 2024; the attention factor's default is the one published with Phi-3."""
    longest = hf.max_position_embeddings if max_model_len is None else max_model_len
    divisors = settings["long_factor"] if longest > original else settings["short_factor"]
    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        factor = settings.get("factor") or hf.max_position_embeddings / original
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"frequency_divisors": tuple(map(float, divisors)), "attention_factor": float(attention_factor)}


def _yarn(settings: Fields, hf: Any, original: int, _max_model_len: int | None) -> Fields:
    """YaRN, Peng et al. 2023; the attention factor's default is their equation 22, with DeepSeek's two multipliers."""
    factor = settings.get("factor") or hf.max_position_embeddings / original

    def attention_factor(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1

    multiplier, divisor = settings.get("mscale"), settings.get("mscale_all_dim")
    computed = attention_factor(1)
    if multiplier and divisor:
        computed = attention_factor(multiplier) / attention_factor(divisor)
    given = settings.get("attention_factor")
    return {
        "original_max_position_embeddings": original,
        "factor": float(factor),
        "beta_fast": float(settings.get("beta_fast") or 32),
        "beta_slow": float(settings.get("beta_slow") or 1),
        "truncate": bool(settings.get("truncate", True)),
        "attention_factor": float(computed if given is None else given),
    }


_ROPE_NUMBERS: dict[str, Callable[[Fields, Any, int, int | None], Fields]] = {
    "default": _no_scaling,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
