"""Loading is strict and exact, export is its inverse, and refusals name what is wrong."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.kernels.errors import CheckpointError, ModelError
from quire.models import checkpoint
from quire.models.checkpoint import INDEX_FILE, SINGLE_FILE, load_params, resolve_model, save_params
from quire.models.config import ModelConfig
from quire.models.params import Params, param_specs
from quire.models.registry import load_config
from tests.models.tiny import TINY, load_in_transformers, make_checkpoint

pytest.importorskip("torch", reason="transformers needs torch to write checkpoints")

Tensors = dict[str, np.ndarray]


def load(folder: Path, *, stacked: bool = True) -> tuple[Params, ModelConfig]:
    config = load_config(folder)
    return load_params(folder, config, np.float32, stacked=stacked), config


def edit(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def assert_same_tensors(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_export_undoes_loading_to_the_bit(name: str, stacked: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / "original", seed=2)
    params, config = load(folder, stacked=stacked)
    save_params(params, config, tmp_path / "copy", dtype=np.float32)
    assert_same_tensors(load_file(tmp_path / "copy" / SINGLE_FILE), load_file(folder / SINGLE_FILE))


@pytest.mark.parametrize("name", ["phi3", "qwen3-moe"])
def test_a_sharded_export_loads_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / "original", seed=3)
    params, config = load(folder)
    save_params(params, config, tmp_path / "sharded", dtype=np.float32, shard_size=30_000)
    shutil.copy(folder / "config.json", tmp_path / "sharded")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 30_000 for file in files)

    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "sharded")[0], params)
    ours = load_in_transformers(tmp_path / "sharded").state_dict()
    theirs = load_in_transformers(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_shards_written_by_transformers_load(tmp_path: Path) -> None:
    whole = make_checkpoint("gemma2", tmp_path / "whole", seed=4)
    sharded = make_checkpoint("gemma2", tmp_path / "sharded", seed=4, max_shard_size="30KB")
    assert (sharded / INDEX_FILE).exists()
    jax.tree.map(np.testing.assert_array_equal, load(sharded)[0], load(whole)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_checkpoints_keep_every_bit(dtype: np.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint("phi3", tmp_path / "original", seed=5)
    params, config = load(folder)
    save_params(params, config, tmp_path / "half", dtype=dtype)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    halves = load_params(tmp_path / "half", config, dtype, stacked=True)
    assert halves["layers"]["q_proj"].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, halves, rounded)
    widened = load_params(tmp_path / "half", config, np.float32, stacked=True)
    jax.tree.map(lambda wide, half: np.testing.assert_array_equal(wide, half.astype(np.float32)), widened, rounded)


def test_stacked_layers_are_the_unrolled_ones_on_top_of_each_other(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, seed=6)
    stacked, unrolled = load(folder, stacked=True)[0], load(folder, stacked=False)[0]
    for layer_idx, layer in enumerate(unrolled["layers"]):
        assert layer.keys() == stacked["layers"].keys()
        for key, array in layer.items():
            np.testing.assert_array_equal(array, stacked["layers"][key][layer_idx], err_msg=key)


def test_host_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, seed=6)
    config = load_config(folder)
    sizes = [4 * int(np.prod(spec.shape)) for spec in param_specs(config).values()]
    tracemalloc.start()
    load_params(
        folder, config, np.float32, stacked=True, place=lambda _, tensor: float(np.asarray(tensor)[..., 0].sum())
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(sizes) < peak < 0.7 * sum(sizes)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "qwen2"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_part_of_a_parameter_is_read_without_the_rest(name: str, stacked: bool, tmp_path: Path, monkeypatch) -> None:
    """What a device's part is read with: fused, transposed, stacked and experts' tensors among them."""
    folder = make_checkpoint(name, tmp_path, seed=6)
    rng = np.random.default_rng(0)
    read = checkpoint.TensorFiles.read
    num_read = 0

    def counted(files, hf_name, index):
        nonlocal num_read
        part = read(files, hf_name, index)
        num_read += part.size
        return part

    monkeypatch.setattr(checkpoint.TensorFiles, "read", counted)

    def place(_, tensor):
        nonlocal num_read
        first = [int(rng.integers(0, size)) for size in tensor.shape]
        index = tuple(slice(a, int(rng.integers(a, size)) + 1) for a, size in zip(first, tensor.shape, strict=True))
        whole = np.asarray(tensor)
        num_read = 0
        part = tensor[index]
        assert num_read == part.size
        np.testing.assert_array_equal(part, whole[index])
        return whole

    load_params(folder, load_config(folder), np.float32, stacked=stacked, place=place)


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, seed=6)
    calls: list[tuple[int, int]] = []
    load_params(
        folder, load_config(folder), np.float32, stacked=True, progress=lambda done, total: calls.append((done, total))
    )
    num_tensors = len(load_file(folder / SINGLE_FILE))
    assert calls == [(done, num_tensors) for done in range(1, num_tensors + 1)]


def test_missing_tensors_are_all_named(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=7)
    gone = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    edit(folder, lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(CheckpointError, match="missing: ") as caught:
        load(folder)
    assert all(name in str(caught.value) for name in gone)


def test_a_tensor_left_over_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=7)
    edit(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(90, np.float32)}))
    with pytest.raises(CheckpointError, match=r"left over: model\.layers\.1\.self_attn\.q_proj\.bias"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("llama", "model.layers.0.self_attn.k_proj.weight", [30, 36]),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", [60, 36]),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.4.w2.weight", [36, 50]),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    name: str, tensor: str, expected: list[int], tmp_path: Path
) -> None:
    folder = make_checkpoint(name, tmp_path, seed=7)
    edit(folder, lambda tensors: tensors.update({tensor: np.zeros((expected[0] + 1, expected[1]), np.float32)}))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert f"{tensor} is {[expected[0] + 1, expected[1]]}, expected {expected}" in str(caught.value)


def test_an_integer_weight_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=7)
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(36, np.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I8"):
        load(folder)


def test_tensors_known_to_be_needless_are_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint("llama3-tied-biased", tmp_path, seed=7)
    needless = {
        "lm_head.weight": np.zeros((101, 36), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32),
    }
    expected = load(folder)[0]
    edit(folder, lambda tensors: tensors.update(needless))
    jax.tree.map(np.testing.assert_array_equal, load(folder)[0], expected)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=7)
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: convert it to safetensors"):
        load(folder)


def test_a_shard_cut_short_or_absent_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=7, max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=shard.name):
        load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(folder)


def test_export_refuses_parameters_of_another_shape(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "original", seed=7)
    params, config = load(folder)
    with pytest.raises(CheckpointError, match="norm has shape"):
        save_params(params | {"norm": jnp.zeros(35, jnp.float32)}, config, tmp_path / "copy", dtype=np.float32)


def test_a_model_is_a_folder_a_bundled_name_or_a_hub_id(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("demo").parts[-3:] == ("models", "demo", "target")
    assert resolve_model("demo-draft").parts[-3:] == ("models", "demo", "draft")
    assert resolve_model("demo-eagle").parts[-3:] == ("models", "demo", "eagle")
    with pytest.raises(ModelError, match=r"neither an existing folder.*'demo'.*Hugging Face id"):
        resolve_model(str(tmp_path / "nowhere"))


def test_without_a_network_a_hub_id_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"quire-tests/no-such-model.*without a network give a local"):
        resolve_model("quire-tests/no-such-model")


def test_the_index_may_name_files_in_any_order(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, seed=8, max_shard_size="30KB")
    expected = load(folder)[0]
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    (folder / INDEX_FILE).write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load(folder)[0], expected)
