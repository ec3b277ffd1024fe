"""config.json files of every age are understood, and what is not supported is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.kernels.errors import ModelError, UnsupportedModelError
from quire.models.registry import SUPPORTED_ARCHITECTURES, load_config
from quire.models.rope import inverse_frequencies
from tests.models.tiny import TINY

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def write(folder: Path, architecture: str, model_type: str, **fields: Any) -> Path:
    config = {"architectures": [architecture], "model_type": model_type, **SIZES, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_tiny(name: str, folder: Path, architecture: str) -> Path:
    config = TINY[name]()
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def test_llama_files_of_the_hub_load(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    write(
        tmp_path,
        "LlamaForCausalLM",
        "llama",
        rope_theta=500000.0,
        rope_scaling=scaling,
        torch_dtype="bfloat16",
        eos_token_id=7,
        bos_token_id=3,
    )
    config = load_config(tmp_path)
    rope = config.ropes[0]
    assert (rope.scaling, rope.theta, rope.factor, rope.original_max_position_embeddings) == ("llama3", 5e5, 8.0, 64)
    assert (config.dtype, config.eos_token_ids, config.bos_token_id, config.head_dim) == ("bfloat16", (7,), 3, 16)
    assert config.norm_eps == 1e-5


def test_phi3_files_of_the_hub_choose_their_factors_by_length(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    fields = {"rope_scaling": scaling, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    write(tmp_path, "Phi3ForCausalLM", "phi3", rope_theta=10000.0, **fields)
    short, long = load_config(tmp_path, max_model_len=64).ropes[0], load_config(tmp_path, max_model_len=65).ropes[0]
    assert (short.frequency_divisors[0], long.frequency_divisors[0], short.rotary_dim) == (1.0, 2.0, 12)
    assert load_config(tmp_path).ropes[0] == long
    np.testing.assert_allclose(inverse_frequencies(long) * 2, inverse_frequencies(short))
    assert short.attention_factor == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)


def test_gemma3_files_of_the_hub_have_two_ropes(tmp_path: Path) -> None:
    fields = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512, "sliding_window_pattern": 3}
    write(tmp_path, "Gemma3ForCausalLM", "gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, **fields)
    config = load_config(tmp_path)
    assert config.sliding_windows == (512, 512, None)
    by_layer = [config.ropes[idx] for idx in config.rope_indices]
    assert [(rope.theta, rope.scaling) for rope in by_layer] == [(1e4, "default")] * 2 + [(1e6, "linear")]
    assert config.tie_word_embeddings


def test_qwen2_windows_are_off_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "Qwen2ForCausalLM", "qwen2", sliding_window=32, use_sliding_window=False, max_window_layers=1)
    assert load_config(tmp_path).sliding_windows == (None, None, None)
    write(tmp_path, "Qwen2ForCausalLM", "qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=1)
    assert load_config(tmp_path).sliding_windows == (None, 32, 32)


def test_stop_ids_of_the_generation_config_win(tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", "llama", eos_token_id=[4, 5])
    assert load_config(tmp_path).eos_token_ids == (4, 5)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 7]}))
    assert load_config(tmp_path).eos_token_ids == (5, 6, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    assert load_config(tmp_path).eos_token_ids == (4, 5)


@pytest.mark.parametrize(("architecture", "model_type"), [("GPT2LMHeadModel", "gpt2"), ("NewForCausalLM", "new-model")])
def test_an_unknown_architecture_is_refused_with_what_is_supported(
    architecture: str, model_type: str, tmp_path: Path
) -> None:
    write(tmp_path, architecture, model_type)
    with pytest.raises(UnsupportedModelError, match=architecture) as caught:
        load_config(tmp_path)
    assert all(supported in str(caught.value) for supported in SUPPORTED_ARCHITECTURES)


def test_a_config_that_names_no_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    with pytest.raises(UnsupportedModelError, match=r"unnamed \(model_type 'llama'\)"):
        load_config(tmp_path)


def test_a_quantized_checkpoint_is_refused_with_its_method(tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", "llama", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized.*'awq'"):
        load_config(tmp_path)


def test_a_rope_that_depends_on_the_length_so_far_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", "llama", rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e4)
    with pytest.raises(UnsupportedModelError, match=r"'dynamic'.*longrope"):
        load_config(tmp_path)


@pytest.mark.parametrize("fields", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}])
def test_experts_in_some_layers_only_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("qwen3-moe", tmp_path, "Qwen3MoeForCausalLM")
    raw = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="some layers only"):
        load_config(tmp_path)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", "llama", hidden_act="relu")
    with pytest.raises(UnsupportedModelError, match="'relu'"):
        load_config(tmp_path)


def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_config(tmp_path)
    write(tmp_path, "LlamaForCausalLM", "llama", num_key_value_heads=2)
    with pytest.raises(ModelError, match="multiple of num_kv_heads"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("phi3-longrope", "Phi3ForCausalLM"), ("gemma3", "Gemma3ForCausalLM"), ("mixtral", "MixtralForCausalLM")],
)
def test_configs_are_hashable_and_equal_by_value(name: str, architecture: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, architecture)
    assert hash(load_config(tmp_path)) == hash(load_config(tmp_path))
    assert load_config(tmp_path) == load_config(tmp_path)


def test_sizes_that_do_not_fit_each_other_are_refused_with_the_file(tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", "llama", hidden_size=65, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"config\.json does not describe a LlamaForCausalLM.*65"):
        load_config(tmp_path)
