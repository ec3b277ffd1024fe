"""What is static about one decoder: sizes, per-layer windows and ropes, and the switches between families.

Everything here is hashable and known before a program is traced, so a compiled step may branch on it freely. Where
the numbers come from (a Hugging Face `config.json`) is the business of `quire.models.registry`.
"""

from dataclasses import dataclass

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROPE_SCALINGS = ("default", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """One set of rotary frequencies. Formulas and sources: `quire.models.rope`."""

    theta: float
    """Base of the geometric series of wavelengths."""
    rotary_dim: int
    """How many of a head's dimensions are rotated: the first ones. Even."""
    scaling: str = "default"
    """One of `ROPE_SCALINGS`; says which of the numbers below are read."""
    factor: float = 1.0
    """linear, llama3, yarn: how many times longer the context became."""
    original_max_position_embeddings: int = 0
    """llama3, yarn: the context length before it was stretched, in tokens."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths beyond original / low_freq_factor are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched in full."""
    truncate: bool = True
    """yarn: round the two boundaries to whole dimensions."""
    frequency_divisors: tuple[float, ...] = ()
    """longrope: one divisor per frequency, rotary_dim / 2 of them (the short or the long set, chosen when loading)."""
    attention_factor: float = 1.0
    """longrope, yarn: cosines and sines are multiplied by it."""

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {', '.join(ROPE_SCALINGS)}")
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and positive, not {self.rotary_dim}")
        if self.scaling == "longrope" and len(self.frequency_divisors) != self.rotary_dim // 2:
            raise ValueError(
                f"longrope needs {self.rotary_dim // 2} frequency divisors (rotary_dim / 2), "
                f"got {len(self.frequency_divisors)}"
            )


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP, in every layer."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    """Width of one expert."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' probabilities are made to sum to 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in [1, {self.num_experts}] (num_experts), not {self.num_experts_per_tok}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. Sizes are in elements, lengths in tokens."""

    architecture: str
    """The Hugging Face class name, for example "LlamaForCausalLM"; it also fixes the tensor names of a checkpoint."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP; experts have their own in `moe`."""
    max_position_embeddings: int
    """Longest sequence the model was made for."""
    attention_scale: float
    """Multiplies q·k. The attention op applies it, not the model."""
    ropes: tuple[RopeConfig, ...]
    """The distinct sets of rotary frequencies (Gemma 3 has two)."""
    rope_indices: tuple[int, ...]
    """Per layer, an index into `ropes`."""
    sliding_windows: tuple[int | None, ...]
    """Per layer, how many of the latest tokens a query sees, itself included; None is all of them."""
    attention_soft_cap: float | None = None
    """c in c·tanh(x / c) on attention scores; applied by the attention op."""
    final_soft_cap: float | None = None
    """The same on the logits."""
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    """Gemma: norms multiply by 1 + weight."""
    activation: str = "silu"
    """One of `ACTIVATIONS`."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k before the rotation."""
    post_norms: bool = False
    """Gemma 2 and 3: norms after attention and after the MLP as well, before each is added to the residual."""
    tie_word_embeddings: bool = False
    holds_head_apart: bool = False
    """Whether a tied embedding is held a second time, as the matrix [D, V] of the head: a device's choice, not the model's."""
    embedding_scale: float | None = None
    """Embeddings are multiplied by it, rounded to the model's dtype (Gemma)."""
    fused_projections: bool = False
    """The checkpoint holds q, k, v as one tensor and gate, up as another (Phi-3). Here they are always apart."""
    moe: MoeConfig | None = None
    dtype: str = "float32"
    """The dtype the checkpoint was saved in: "float32", "bfloat16" or "float16"."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if len(self.sliding_windows) != self.num_layers or len(self.rope_indices) != self.num_layers:
            raise ValueError(
                f"sliding_windows and rope_indices need one entry per layer ({self.num_layers}), "
                f"got {len(self.sliding_windows)} and {len(self.rope_indices)}"
            )
        if not all(0 <= idx < len(self.ropes) for idx in self.rope_indices):
            raise ValueError(f"rope_indices {self.rope_indices} must lie in [0, {len(self.ropes)})")
        if len({rope.rotary_dim for rope in self.ropes}) != 1 or self.ropes[0].rotary_dim > self.head_dim:
            raise ValueError(f"all ropes must rotate the same number of dimensions, at most head_dim ({self.head_dim})")
