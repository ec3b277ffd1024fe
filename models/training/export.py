"""The shapes of the pair, and how a folder in Hugging Face format is written."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quire.models.checkpoint import save_params
from quire.models.config import ModelConfig
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
    """Writes the whole folder beside its place first, so that a reader never meets half a model."""
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    write_config(staging, raw_config, tokenizer)
    save_params(params, config, staging, dtype="bfloat16", shard_size=2**30)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
        path.replace(folder / path.name)
    staging.rmdir()
