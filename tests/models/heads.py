"""EAGLE-3 heads for tests: tiny random ones on disk in each layout that is published, and what they compute, in torch.

The reference is written from the description of the head (Li et al. 2025) for one sequence, without a cache. Sizes are as awkward as
those of `tests.models.tiny`. torch is imported where it is needed only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE, HIDDEN_SIZE, EPS = 101, 36, 1e-5
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "draft_vocab_size": 40,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 50,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": 500.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_OUTSIDE = ("architectures", "draft_vocab_size", "torch_dtype")


def speculators_config(**changes: Any) -> dict[str, Any]:
    """The layout that holds the layer's config within."""
    layer = {name: value for name, value in PUBLISHED.items() if name not in _OUTSIDE}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 40,
        "norm_before_residual": True,
        "target_hidden_size": None,
        "torch_dtype": "float32",
        "transformer_layer_config": layer,
    } | changes


@dataclass(frozen=True)
class Head:
    """A layout of a head, and the target that it is for."""

    config: dict[str, Any]
    target_hidden_size: int = HIDDEN_SIZE
    target_layers: int = 8
    num_captured: int = 3
    has_embedding: bool = False
    has_biases: bool = False
    layer_prefix: str = "midlayer."
    norm_before_residual: bool = False
    left_out: tuple[str, ...] = ()


HEADS = {
    "published": Head(PUBLISHED),
    # The first heads that were published carry a Llama's name, and one of them its number of layers.
    "named as a Llama": Head(PUBLISHED | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 40}),
    "all tokens": Head(PUBLISHED | {"draft_vocab_size": VOCAB_SIZE}),
    "all tokens, without a mapping": Head(
        {name: value for name, value in PUBLISHED.items() if name != "draft_vocab_size"}, left_out=("d2t", "t2d")
    ),
    "own embedding": Head(PUBLISHED | {"target_hidden_size": 20}, target_hidden_size=20, has_embedding=True),
    "biases": Head(PUBLISHED | {"attention_bias": True, "mlp_bias": True}, has_biases=True, left_out=("t2d",)),
    "two layers named": Head(PUBLISHED | {"eagle_aux_hidden_state_layer_ids": [0, 8]}, num_captured=2),
    "speculators": Head(speculators_config(), has_embedding=True, layer_prefix="layers.0.", norm_before_residual=True),
}


def draft_vocab_size(head: Head) -> int:
    """Tokens that the head can propose."""
    return int(head.config.get("draft_vocab_size", VOCAB_SIZE))


def make_tensors(head: Head, seed: int) -> dict[str, Any]:
    """Random torch tensors under their published names; the draft vocabulary is a random part of the target's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    width, heads, kv_heads, mlp = HIDDEN_SIZE, 9 * 10, 3 * 10, 50
    size = draft_vocab_size(head)
    prefix = head.layer_prefix
    shapes = {
        "fc.weight": (width, head.num_captured * head.target_hidden_size),
        f"{prefix}hidden_norm.weight": (width,),
        f"{prefix}input_layernorm.weight": (width,),
        f"{prefix}self_attn.q_proj.weight": (heads, 2 * width),
        f"{prefix}self_attn.k_proj.weight": (kv_heads, 2 * width),
        f"{prefix}self_attn.v_proj.weight": (kv_heads, 2 * width),
        f"{prefix}self_attn.o_proj.weight": (width, heads),
        f"{prefix}post_attention_layernorm.weight": (width,),
        f"{prefix}mlp.gate_proj.weight": (mlp, width),
        f"{prefix}mlp.up_proj.weight": (mlp, width),
        f"{prefix}mlp.down_proj.weight": (width, mlp),
        "norm.weight": (width,),
        "lm_head.weight": (size, width),
    }
    if head.has_biases:
        shapes |= {
            name.replace(".weight", ".bias"): shape[:1]
            for name, shape in shapes.items()
            if prefix in name and len(shape) == 2
        }
    if head.has_embedding:
        shapes["embed_tokens.weight"] = (VOCAB_SIZE, width)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = 1.5 * noise / shape[-1] ** 0.5
        else:
            tensors[name] = 0.3 * noise + (1 if name.endswith("norm.weight") else 0)
    ids = torch.randperm(VOCAB_SIZE, generator=generator)[:size].sort().values
    tensors["d2t"] = ids - torch.arange(size)
    tensors["t2d"] = torch.isin(torch.arange(VOCAB_SIZE), ids)
    return {name: tensor for name, tensor in tensors.items() if name not in head.left_out}


def write_head(head: Head, folder: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Writes the head into `folder`, `changes` in its tensors included (None: left out); returns the tensors."""
    from safetensors.torch import save_file

    tensors = {name: t for name, t in (make_tensors(head, seed) | changes).items() if t is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(head.config, folder)
    return tensors


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Writes config.json alone."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def reference_features(tensors: dict[str, Any], captured: np.ndarray) -> np.ndarray:
    """[T, D] of the target's hidden states [T, n * Dt]."""
    import torch

    return np.asarray((torch.from_numpy(captured) @ tensors["fc.weight"].T).numpy())


def reference_hidden(
    tensors: dict[str, Any], head: Head, embeddings: np.ndarray, features: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """The head's layer over one sequence of entries, each attending to those before it: [T, D]."""
    import torch

    part = {name.removeprefix(head.layer_prefix): tensor for name, tensor in tensors.items()}

    def linear(name: str, x: Any) -> Any:
        y = x @ part[f"{name}.weight"].T
        return y + part[f"{name}.bias"] if f"{name}.bias" in part else y

    feature = torch.from_numpy(features)
    normed = _norm(feature, part["hidden_norm.weight"])
    both = torch.cat([_norm(torch.from_numpy(embeddings), part["input_layernorm.weight"]), normed], dim=-1)
    q, k, v = (linear(f"self_attn.{letter}_proj", both).unflatten(-1, (-1, 10)) for letter in "qkv")  # [T, heads, H]
    angle = torch.from_numpy(positions).float()[:, None, None] * 500.0 ** (-torch.arange(0, 10, 2) / 10)
    turn = torch.polar(torch.ones_like(angle), angle)  # [T, 1, H/2]
    q, k = (torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k))
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    scores = torch.einsum("tnh,snh->nts", q, k.conj()).real / 10**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    out = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)
    x = (normed if head.norm_before_residual else feature) + linear("self_attn.o_proj", out)
    h = _norm(x, part["post_attention_layernorm.weight"])
    h = torch.nn.functional.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
    return np.asarray((x + linear("mlp.down_proj", h)).numpy())


def reference_logits(tensors: dict[str, Any], hidden: np.ndarray) -> np.ndarray:
    """[R, Vd] over the head's own tokens."""
    import torch

    return np.asarray((_norm(torch.from_numpy(hidden), tensors["norm.weight"]) @ tensors["lm_head.weight"].T).numpy())


def _norm(x: Any, weight: Any) -> Any:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight
