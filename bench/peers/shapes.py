"""Checkpoints with random weights in published shapes, made here so that nothing is downloaded and everybody loads the same bytes.

Written as transformers would: config.json, model.safetensors, tokenizer.json. The weights are drawn so that attention and MLP outweigh
the embedding of the last token. A small embedding of one token would otherwise win every argmax and all engines would agree whatever they
computed; as it is, equal tokens say that they run the same model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
NUM_MERGES = 200
MAX_POSITIONS = 8192


@dataclass(frozen=True)
class Shape:
    """A decoder. `shortened` divides all lengths of the workload, for shapes that are there for tests."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    shortened: int = 1

    @property
    def model_type(self) -> str:
        """The family as config.json and GGUF name it: llama or qwen3."""
        return self.architecture.removesuffix("ForCausalLM").lower()

    @property
    def num_parameters(self) -> int:
        """Weights in the checkpoint; the embedding counts once, it is the output head too."""
        return sum(int(np.prod(shape)) for _, shape, _ in _tensors(self))

    def kv_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """What one token takes in the KV cache, all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number


SHAPES = {
    "llama-135m": Shape("LlamaForCausalLM", 576, 30, 9, 3, 64, 1536, 49_152, 100_000.0),
    "qwen3-0.6b": Shape("Qwen3ForCausalLM", 1024, 28, 16, 8, 128, 3072, 151_936, 1_000_000.0),
    "tiny": Shape("LlamaForCausalLM", 64, 2, 4, 2, 32, 128, 512, 10_000.0, shortened=8),
}


def make_checkpoint(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Writes the checkpoint unless `folder` holds this one already; the same bytes for the same shape and seed."""
    mark = folder / "made_from.json"
    made_from = json.dumps({**asdict(shape), "seed": seed, "layout": 1})
    if mark.is_file() and mark.read_text() == made_from:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(rng, dims, std) for name, dims, std in _tensors(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config(shape))
    _write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_tokenizer(shape.vocab_size, folder)
    mark.write_text(made_from)  # last: a folder without it is made anew
    return folder


def _draw(rng: np.random.Generator, dims: tuple[int, ...], std: float) -> np.ndarray:
    if std == 0.0:  # norms
        return np.ones(dims, ml_dtypes.bfloat16)
    return (std * rng.standard_normal(dims, np.float32)).astype(ml_dtypes.bfloat16)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, dimensions and standard deviation of every tensor; 0 stands for a norm, which is all ones."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden), 0.02
    for idx in range(shape.num_layers):
        layer = f"model.layers.{idx}"
        yield f"{layer}.input_layernorm.weight", (hidden,), 0.0
        yield (
            f"{layer}.self_attn.q_proj.weight",
            (q_size, hidden),
            2.0 * hidden**-0.5,
        )  # sharp enough to tell positions apart
        yield f"{layer}.self_attn.k_proj.weight", (kv_size, hidden), hidden**-0.5
        yield f"{layer}.self_attn.v_proj.weight", (kv_size, hidden), hidden**-0.5
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q_size), q_size**-0.5
        if shape.model_type == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,), 0.0
            yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,), 0.0
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), 0.0
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden), hidden**-0.5
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden), hidden**-0.5
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner), inner**-0.5
    yield "model.norm.weight", (hidden,), 0.0


def _config(shape: Shape) -> dict[str, object]:
    """config.json, in the spelling of transformers 4 and of transformers 5."""
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A byte-level BPE with few merges, filled up to the vocabulary's size with tokens that no text becomes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [letter for letter in "etaoinshrdlucm" if letter in alphabet]
    num_free = vocab_size - len(SPECIAL_TOKENS) - len(alphabet)
    merges = [(a, b) for a in letters for b in letters][: min(NUM_MERGES, num_free)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    tokens += [f"<unused_{idx}>" for idx in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: idx for idx, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
