"""The checkpoint that everybody loads, and its form for llama.cpp."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.bench.peers.drivers.write_gguf import neighbouring_rotation, read_bfloat16, write_gguf
from quire.bench.peers.shapes import SHAPES, make_checkpoint

TINY = SHAPES["tiny"]
QWEN = replace(TINY, architecture="Qwen3ForCausalLM")


@pytest.fixture(scope="module", params=[TINY, QWEN], ids=["llama", "qwen3"])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shape, tmp_path_factory):
    return make_checkpoint(shape, tmp_path_factory.mktemp("checkpoint") / "hf")


def test_the_shapes_have_the_sizes_of_their_names():
    assert SHAPES["llama-135m"].num_parameters == pytest.approx(135e6, rel=0.01)
    assert SHAPES["qwen3-0.6b"].num_parameters == pytest.approx(0.6e9, rel=0.01)


def test_a_checkpoint_is_made_once_and_always_the_same(shape, folder, tmp_path):
    again = make_checkpoint(shape, tmp_path / "hf")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    make_checkpoint(shape, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    make_checkpoint(replace(shape, rope_theta=7.0), again)
    assert json.loads((again / "config.json").read_text())["rope_theta"] == 7.0


def test_transformers_loads_all_of_it(shape, folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters
    assert model.config.rope_parameters["rope_theta"] == shape.rope_theta


def test_the_tokenizer_fills_the_vocabulary_and_gives_text_back(shape, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shape.vocab_size
    text = "the rain in Spain, naïve café 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_next_token_does_not_follow_from_the_last_one_alone(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = torch.tensor(rng.integers(3, TINY.vocab_size, (32, 12)))
    prompts[:, -1] = 5
    with torch.inference_mode():
        best = model(prompts).logits[:, -1].argmax(-1)
    assert len(set(best.tolist())) > 16


def test_a_gguf_file_holds_the_settings_and_every_tensor(shape, folder, tmp_path):
    write_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    def field(name):
        return reader.get_field(f"{shape.model_type}.{name}").contents()

    assert reader.get_field("general.architecture").contents() == shape.model_type
    assert (field("block_count"), field("attention.head_count"), field("attention.head_count_kv")) == (2, 4, 2)
    assert (field("attention.key_length"), field("rope.freq_base")) == (shape.head_dim, shape.rope_theta)
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == shape.vocab_size
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    source = dict(read_bfloat16(folder / "model.safetensors"))
    assert len(tensors) == len(source)
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v")):
        tensor = tensors[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        assert np.array_equal(tensor.data.view(np.uint16), source[f"model.layers.1.{ours}.weight"])
    assert np.array_equal(tensors["output_norm.weight"].data, np.ones(shape.hidden_size, np.float32))
    wanted = source["model.layers.0.self_attn.k_proj.weight"]
    if shape.model_type == "llama":
        wanted = neighbouring_rotation(wanted, shape.num_kv_heads)
    assert np.array_equal(tensors["blk.0.attn_k.weight"].data.view(np.uint16), wanted)


def test_reordered_rows_rotated_as_neighbours_attend_as_halves_do():
    rng = np.random.default_rng(0)
    heads, half, hidden = 2, 4, 6
    q, k = rng.standard_normal((2, heads * 2 * half, hidden))
    x, y = rng.standard_normal((2, hidden))
    angles = rng.uniform(0, 3, half)

    def rotate(pairs, by):  # [heads, half, 2]
        a, b = pairs[..., 0], pairs[..., 1]
        return np.stack([a * np.cos(by) - b * np.sin(by), a * np.sin(by) + b * np.cos(by)], -1)

    def as_halves(weight, vector, by):
        return rotate((weight @ vector).reshape(heads, 2, half).swapaxes(1, 2), by)

    def as_neighbours(weight, vector, by):
        return rotate((neighbouring_rotation(weight, heads) @ vector).reshape(heads, half, 2), by)

    def scores(how):
        return (how(q, x, 3 * angles) * how(k, y, angles)).sum((1, 2))

    assert np.allclose(scores(as_halves), scores(as_neighbours))
    assert not np.allclose(scores(as_halves), (q @ x).reshape(heads, -1).sum(1) * 0)
