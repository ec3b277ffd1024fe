"""The table of parameters: one line each, from which shapes, random init, loading and export all come.

A model's parameters are a plain dict:

    {"embed_tokens": [V, D], "layers": ..., "norm": [D], "lm_head": [D, V] unless tied to the embedding and not held apart}

"layers" is either a dict of arrays stacked over the layers, [L, ...], or a tuple of L dicts of single arrays. Linear
weights are [in, out] (Hugging Face has [out, in]), experts [E, in, out].
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quire.models.config import ModelConfig

Layer = dict[str, Any]
"""Arrays, and weights in a form of the device's own (`quire.kernels.linear.contract.Weight`)."""
Params = dict[str, Any]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: what we hold, what a checkpoint calls it, and how one becomes the other (both ways)."""

    name: str
    """"norm", or "layers.q_proj" for a parameter that every layer has."""
    shape: tuple[int, ...]
    """As held when stacked: layers first, then experts, then [in, out]."""
    axes: tuple[str, ...]
    """A logical name per dimension, for sharding: layers, experts, vocab, embed, heads, kv_heads, head_dim, mlp."""
    hf_name: str
    """The checkpoint's name, with {layer} and {expert} to fill in."""
    transpose: bool
    """Whether the checkpoint holds [out, in]."""
    rows: tuple[int, int, int] | None
    """(start, stop, total): the tensor is these rows of a fused one with `total` rows. None: it is the whole."""
    init_std: float
    """Standard deviation of the random init; 0 makes it the constant below."""
    init_constant: float

    @property
    def is_per_layer(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def key(self) -> str:
        """The key in the dict that holds it."""
        return self.name.removeprefix("layers.")

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape without the layers axis."""
        return self.shape[1:] if self.is_per_layer else self.shape

    @property
    def num_experts(self) -> int | None:
        """How many checkpoint tensors one layer's array is stacked from; None if it is not over experts."""
        return self.layer_shape[0] if "{expert}" in self.hf_name else None

    def is_product_weight(self, config: ModelConfig) -> bool:
        """Whether activations are multiplied with it: what the linear op prepares. A tied embedding is one too."""
        if self.name == "embed_tokens":
            return config.tie_word_embeddings and not config.holds_head_apart
        return len(self.layer_shape) >= 2

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor, the whole of it where it is fused."""
        shape = self.layer_shape if self.num_experts is None else self.layer_shape[1:]
        shape = shape[::-1] if self.transpose else shape
        return shape if self.rows is None else (self.rows[2], *shape[1:])


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model, by name, in the order of computation."""
    table = _Table(config)
    table.add("embed_tokens", ("vocab", "embed"), "model.embed_tokens.weight", transpose=False)
    _add_attention(table, config)
    _add_norms(table, config)
    if config.moe is None:
        _add_mlp(table, config)
    else:
        _add_experts(table, config)
    table.add("norm", ("embed",), "model.norm.weight")
    if not config.tie_word_embeddings:
        table.add("lm_head", ("embed", "vocab"), "lm_head.weight")
    elif config.holds_head_apart:
        table.add("lm_head", ("embed", "vocab"), "model.embed_tokens.weight")
    return table.specs


class _Table:
    """Collects specs, filling in what follows from the axes: shape, transposition, init."""

    def __init__(self, config: ModelConfig) -> None:
        self.specs: dict[str, ParamSpec] = {}
        self._residual_scale = 1 / math.sqrt(2 * config.num_layers)
        self._norm_init = 0.0 if config.norm_unit_offset else 1.0
        self._sizes = {
            "layers": config.num_layers,
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "heads": config.num_heads * config.head_dim,
            "kv_heads": config.num_kv_heads * config.head_dim,
            "head_dim": config.head_dim,
            "mlp": config.intermediate_size if config.moe is None else config.moe.intermediate_size,
            "experts": 0 if config.moe is None else config.moe.num_experts,
        }

    def add(
        self,
        name: str,
        axes: tuple[str, ...],
        hf_name: str,
        *,
        transpose: bool | None = None,
        fused: tuple[int, int] | None = None,
    ) -> None:
        """`fused` is (first row, total rows) of the checkpoint tensor that this one is a part of."""
        shape = tuple(self._sizes[axis] for axis in axes)
        is_matrix = sum(axis not in ("layers", "experts") for axis in axes) == 2 or name == "layers.router"
        rows = None if fused is None else (fused[0], fused[0] + shape[-1], fused[1])
        std = 0.0
        if is_matrix:
            std = 1 / math.sqrt(self._sizes["embed"] if name == "embed_tokens" else shape[-2])
            # What is added to the residual stream is kept small so that its scale does not grow with depth.
            std *= self._residual_scale if name.endswith(("o_proj", "down_proj")) else 1.0
        self.specs[name] = ParamSpec(
            name=name,
            shape=shape,
            axes=axes,
            hf_name=hf_name,
            transpose=is_matrix if transpose is None else transpose,
            rows=rows,
            init_std=std,
            init_constant=self._norm_init if "norm" in name else 0.0,
        )


_ATTN = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."


def _add_attention(table: _Table, config: ModelConfig) -> None:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    first_row = {"q": 0, "k": heads, "v": heads + kv_heads}
    for letter, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
        part, fused = f"{letter}_proj", None
        if config.fused_projections:
            part, fused = "qkv_proj", (first_row[letter], heads + 2 * kv_heads)
        table.add(f"layers.{letter}_proj", ("layers", "embed", axis), f"{_ATTN}{part}.weight", fused=fused)
        if config.qkv_bias:
            table.add(f"layers.{letter}_bias", ("layers", axis), f"{_ATTN}{part}.bias", fused=fused)
    if config.qk_norm:
        table.add("layers.q_norm", ("layers", "head_dim"), f"{_ATTN}q_norm.weight")
        table.add("layers.k_norm", ("layers", "head_dim"), f"{_ATTN}k_norm.weight")
    table.add("layers.o_proj", ("layers", "heads", "embed"), f"{_ATTN}o_proj.weight")
    if config.o_bias:
        table.add("layers.o_bias", ("layers", "embed"), f"{_ATTN}o_proj.bias")


def _add_norms(table: _Table, config: ModelConfig) -> None:
    axes = ("layers", "embed")
    names = {"input_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        names = {
            "input_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    for name, hf_name in names.items():
        table.add(f"layers.{name}", axes, f"model.layers.{{layer}}.{hf_name}.weight")


def _add_mlp(table: _Table, config: ModelConfig) -> None:
    width = config.intermediate_size
    for name, first_row in (("gate", 0), ("up", width)):
        part, fused = f"{name}_proj", None
        if config.fused_projections:
            part, fused = "gate_up_proj", (first_row, 2 * width)
        table.add(f"layers.{name}_proj", ("layers", "embed", "mlp"), f"{_MLP}{part}.weight", fused=fused)
        if config.mlp_bias:
            table.add(f"layers.{name}_bias", ("layers", "mlp"), f"{_MLP}{part}.bias", fused=fused)
    table.add("layers.down_proj", ("layers", "mlp", "embed"), f"{_MLP}down_proj.weight")
    if config.mlp_bias:
        table.add("layers.down_bias", ("layers", "embed"), f"{_MLP}down_proj.bias")


def _add_experts(table: _Table, config: ModelConfig) -> None:
    prefix, names = _MLP, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if config.architecture == "MixtralForCausalLM":
        prefix, names = "model.layers.{layer}.block_sparse_moe.", {"gate": "w1", "up": "w3", "down": "w2"}
    table.add("layers.router", ("layers", "embed", "experts"), f"{prefix}gate.weight")
    for name in ("gate", "up", "down"):
        matrix = ("mlp", "embed") if name == "down" else ("embed", "mlp")
        hf_name = f"{prefix}experts.{{expert}}.{names[name]}.weight"
        table.add(f"layers.experts_{name}_proj", ("layers", "experts", *matrix), hf_name)


def build_params(config: ModelConfig, make: Callable[[ParamSpec, int | None], Any], *, stacked: bool) -> Params:
    """The parameter tree with `make(spec, layer)` at every leaf; layer is None for whole (stacked) parameters."""
    specs = param_specs(config).values()
    params: Params = {}
    per_layer = [spec for spec in specs if spec.is_per_layer]
    for spec in specs:
        if not spec.is_per_layer:
            params[spec.key] = make(spec, None)
    if stacked:
        params["layers"] = {spec.key: make(spec, None) for spec in per_layer}
    else:
        params["layers"] = tuple(
            {spec.key: make(spec, layer) for spec in per_layer} for layer in range(config.num_layers)
        )
    return params


class HostTensor(Protocol):
    """A parameter on the host, an array or one that is still in its files: what is indexed is what is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray: ...

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> np.ndarray: ...


Place = Callable[[ParamSpec, HostTensor], Any]
"""Takes a parameter to where and how it shall be held; arrays may come in any memory order."""


def as_array(spec: ParamSpec, tensor: HostTensor) -> Array:
    """The plainest `Place`: an array on jax's default device."""
    return jnp.asarray(np.asarray(tensor))


def init_params(config: ModelConfig, seed: int, dtype: Any, *, stacked: bool, place: Place = as_array) -> Params:
    """Random parameters, scaled so that a deep model still gives logits of about unit variance.

    Drawn with numpy from (seed, name, layer) alone: the same on every device, stacked or not.
    """

    specs = param_specs(config)

    def make(spec: ParamSpec, layer: int | None) -> Any:
        if spec.name == "lm_head" and config.tie_word_embeddings:
            return place(spec, draw(specs["embed_tokens"], seed, 0, dtype).T)
        if not spec.is_per_layer:
            return place(spec, draw(spec, seed, 0, dtype))
        if layer is not None:
            return place(spec, draw(spec, seed, layer, dtype))
        whole = np.empty(spec.shape, dtype)
        for idx in range(config.num_layers):
            whole[idx] = draw(spec, seed, idx, dtype)
        return place(spec, whole)

    return build_params(config, make, stacked=stacked)


def draw(spec: ParamSpec, seed: int, layer: int, dtype: Any) -> np.ndarray:
    """One layer's random value of a parameter, or the constant it begins as; from (seed, name, layer) alone."""
    if spec.init_std == 0:
        return np.full(spec.layer_shape, spec.init_constant, dtype)
    generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode()), layer])
    values = generator.standard_normal(spec.layer_shape, np.float32)
    values *= np.float32(spec.init_std)
    return values.astype(dtype)


def abstract_params(config: ModelConfig, dtype: Any, *, stacked: bool) -> Params:
    """The same tree as `init_params` gives, of jax.ShapeDtypeStruct: for lowering without weights."""

    def make(spec: ParamSpec, layer: int | None) -> jax.ShapeDtypeStruct:
        shape = spec.shape if layer is None else spec.layer_shape
        return jax.ShapeDtypeStruct(shape, dtype)

    return build_params(config, make, stacked=stacked)
