"""The shapes of the pair and of its head, and how a folder in Hugging Face format is written."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from quire.models.checkpoint import SINGLE_FILE, save_params
from quire.models.config import ModelConfig
from quire.models.eagle import DRAFT_COLUMNS, EagleConfig, eagle_specs
from quire.models.params import Params
from quire.models.registry import make_llama_config
from quire.models.training.tokenizer import END_OF_TEXT, END_OF_TURN, VOCAB_SIZE, save_tokenizer

MAX_POSITION_EMBEDDINGS = 2048


def hf_config(size: dict[str, int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of one model of the pair."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        **size,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "bfloat16",
    }


TARGET_SIZE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 640,
}
DRAFT_SIZE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 320,
}


def write_config(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes all but the weights: config, generation config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END_OF_TURN)]
    generation = {"eos_token_id": ends, "pad_token_id": ends[0], "do_sample": False}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, MAX_POSITION_EMBEDDINGS)


def export_model(
    folder: Path, params: Any, config: ModelConfig, raw_config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes the whole folder, weights in bfloat16."""
    with _staged(folder) as staging:
        write_config(staging, raw_config, tokenizer)
        save_params(params, config, staging, dtype="bfloat16", shard_size=2**30)


HEAD_SIZE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
}


def hf_head_config(
    size: Mapping[str, int], target: Mapping[str, Any], draft_vocab_size: int, captured_layers: tuple[int, ...]
) -> dict[str, Any]:
    """The config.json of an EAGLE-3 head in the published layout, for the target with that config.json."""
    same = ("vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "bos_token_id", "eos_token_id")
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{name: target[name] for name in same},
        "draft_vocab_size": draft_vocab_size,
        **size,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(captured_layers),  # counted as inputs of these layers
        "torch_dtype": "bfloat16",
    }


def head_config(raw: Mapping[str, Any], target: ModelConfig) -> EagleConfig:
    """The head of `hf_head_config`, before there is a folder with its weights."""
    return EagleConfig(
        model=make_llama_config(Path(), dict(raw), raw["architectures"][0]),
        target_hidden_size=target.hidden_size,
        captured_layers=tuple(raw["eagle_aux_hidden_state_layer_ids"]),
        draft_vocab_size=raw["draft_vocab_size"],
    )


def export_head(
    folder: Path, params: Params, config: EagleConfig, raw_config: Mapping[str, Any], target_ids: np.ndarray
) -> None:
    """Writes a head in bfloat16 as it is published; `target_ids` int64 [Vd] are the target's ids of its tokens, ascending."""
    with _staged(folder) as staging:
        tensors = {
            spec.hf_name: _in_checkpoint(np.asarray(params[spec.key]), spec.transpose)
            for spec in eagle_specs(config).values()
            if spec.name != DRAFT_COLUMNS
        }
        tensors["d2t"] = target_ids.astype(np.int64) - np.arange(len(target_ids))
        tensors["t2d"] = np.isin(np.arange(config.model.vocab_size), target_ids)
        save_file(tensors, staging / SINGLE_FILE, metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")


def _in_checkpoint(array: np.ndarray, transpose: bool) -> np.ndarray:
    return np.ascontiguousarray((array.T if transpose else array).astype(jnp.bfloat16))


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, whose files then take the place of those there: a reader never meets half a model."""
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
        path.replace(folder / path.name)
    staging.rmdir()
