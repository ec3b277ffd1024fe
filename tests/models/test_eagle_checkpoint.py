"""Which folders are EAGLE-3 heads, for which targets, and what is said of the others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.errors import CheckpointError, ModelError, UnsupportedModelError
from quire.models.config import ModelConfig
from quire.models.eagle import EagleConfig, eagle_specs
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from tests.models.heads import (
    HEADS,
    HIDDEN_SIZE,
    PUBLISHED,
    VOCAB_SIZE,
    Head,
    speculators_config,
    write_config,
    write_head,
)
from tests.models.test_eagle import target_config

torch = pytest.importorskip("torch", reason="heads are written with torch")

HEAD = HEADS["published"]
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def config_of(folder: Path, target: ModelConfig | None = None, **changes: Any) -> EagleConfig:
    """The config of the published head with `changes` in its config.json."""
    write_head(HEAD, folder)
    write_config(HEAD.config | changes, folder)
    return load_eagle_config(folder, target or target_config(HEAD))


def load(folder: Path, head: Head = HEAD, **tensors: Any) -> dict[str, Any]:
    """The parameters of a head with `tensors` changed in its files, after its config was read from whole ones."""
    write_head(head, folder)
    config = load_eagle_config(folder, target_config(head))
    write_head(head, folder, **tensors)
    return load_eagle_params(folder, config, np.float32)


def test_a_head_s_config_says_what_its_files_say(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config == EagleConfig(
        model=config.model,
        target_hidden_size=HIDDEN_SIZE,
        captured_layers=(2, 4, 5),
        draft_vocab_size=40,
        has_embedding=False,
        norm_before_residual=False,
        layer_prefix="midlayer.",
    )
    model = config.model
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (1, 9, 3, 10)
    assert (model.vocab_size, model.hidden_size, model.intermediate_size) == (VOCAB_SIZE, HIDDEN_SIZE, 50)
    assert (model.ropes[0].theta, model.norm_eps, model.embedding_scale) == (500.0, 1e-5, None)


def test_every_parameter_is_the_file_s(tmp_path: Path) -> None:
    head = HEADS["biases"]
    tensors = write_head(head, tmp_path)
    config = load_eagle_config(tmp_path, target_config(head))
    params = load_eagle_params(tmp_path, config, np.float32)
    specs = eagle_specs(config)
    assert params.keys() == {spec.key for spec in specs.values()}
    for spec in specs.values():
        if spec.hf_name != "d2t":
            expected = tensors[spec.hf_name].numpy()
            np.testing.assert_array_equal(
                params[spec.key], expected.T if spec.transpose else expected, err_msg=spec.name
            )
    target_ids = np.arange(40) + tensors["d2t"].numpy()
    np.testing.assert_array_equal(np.asarray(params["draft_columns"])[target_ids], np.arange(40))


def test_a_head_is_held_in_the_dtype_asked_for_and_its_columns_are_integers(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, load_eagle_params(tmp_path, config, jnp.bfloat16))
    assert dtypes.pop("draft_columns") == np.int32
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (2, 4, 5)),
        ({LAYER_IDS: [1, 3, 8]}, (1, 3, 8)),
        # The same tensors in the words of who counts the layers' outputs.
        ({"eagle_config": {LAYER_IDS: [0, 2, 7], "use_aux_hidden_state": True}}, (1, 3, 8)),
        ({LAYER_IDS: [0, 1, 2], "eagle_config": {LAYER_IDS: [5, 6, 7]}}, (0, 1, 2)),
        ({LAYER_IDS: None, "eagle_config": {LAYER_IDS: []}}, (2, 4, 5)),
    ],
)
def test_the_captured_layers_are_those_that_the_config_names(
    changes: dict[str, Any], layers: tuple[int, ...], tmp_path: Path
) -> None:
    assert config_of(tmp_path, **changes).captured_layers == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER_IDS: [1, 3, 9]}, r"layers \[1, 3, 9\] of the target .*, which has 8;.*trained for this model"),
        ({LAYER_IDS: [3, 1, 5]}, r"\[3, 1, 5\].*ascending"),
        ({LAYER_IDS: [1, 1, 5]}, r"\[1, 1, 5\].*different ones"),
        ({"eagle_config": {LAYER_IDS: [1, 3, 8]}}, r"\[2, 4, 9\]"),
    ],
)
def test_layers_that_the_target_does_not_have_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        config_of(tmp_path, **changes)


def test_a_target_with_too_few_layers_for_the_default_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"\[2, 2, 1\] of the target \(config.json has no {LAYER_IDS}\), which has 4"):
        config_of(tmp_path, target_config(replace(HEAD, target_layers=4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None},
            "LlamaForCausalLM, without draft_vocab_size",
        ),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "LlamaForCausalLMEagle; supported are LlamaForCausalLMEagle3"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM.*used as a draft model"),
        ({"architectures": None}, "unnamed"),
        ({"model_type": "qwen3"}, "model_type 'qwen3'; supported is 'llama'"),
        ({"fc_norm": True}, "fc_norm=True, which is not supported; only False is"),
        ({"norm_output": True}, "norm_output=True"),
        ({"norm_before_fc": True}, "norm_before_fc=True"),
        ({"parallel_drafting": True}, "parallel_drafting=True"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=False.*only True is"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm=True"),
        ({"eagle_config": {"parallel_draft_step": 2}}, "parallel_draft_step=2.*only 1 is"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized.*'fp8'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(tmp_path, **changes)


def test_a_head_of_the_first_two_kinds_is_refused_by_its_tensors(tmp_path: Path) -> None:
    """Their one layer reads an embedding and the last hidden state, joined by an fc with a bias."""
    shape = (HIDDEN_SIZE, 2 * HIDDEN_SIZE)
    write_head(HEAD, tmp_path, **{"fc.weight": torch.zeros(shape), "d2t": None, "t2d": None})
    with pytest.raises(UnsupportedModelError, match=r"EAGLE-1 or EAGLE-2 head.*\[36, 72\].*here with \[36, 108\]"):
        load_eagle_config(tmp_path, target_config(HEAD))
    write_head(HEAD, tmp_path, **{"fc.weight": None})
    with pytest.raises(UnsupportedModelError, match=r"no tensor fc\.weight.*use it as a draft model"):
        load_eagle_config(tmp_path, target_config(HEAD))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"vocab_size": 103}, "vocab_size 101, this one has 103"),
        ({"hidden_size": 20}, r"fc\.weight is \[36, 108\].*3 layers of 20 and a head of 36 it would be \[36, 60\]"),
    ],
)
def test_a_head_for_another_target_is_refused_with_both_numbers(
    target: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"{message}.*trained for this model"):
        config_of(tmp_path, replace(target_config(HEAD), **target))


def test_a_head_without_an_embedding_needs_the_target_s_width(tmp_path: Path) -> None:
    head = replace(HEADS["own embedding"], has_embedding=False)
    write_head(head, tmp_path)
    with pytest.raises(ModelError, match="hidden_size 36 cannot read the embedding of a target of hidden_size 20"):
        load_eagle_config(tmp_path, target_config(head))


def test_a_draft_vocabulary_larger_than_the_target_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\[1, 101\] \(vocab_size\), not 102"):
        config_of(tmp_path, draft_vocab_size=102)


def test_a_config_that_does_not_describe_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not describe a LlamaForCausalLMEagle3"):
        config_of(tmp_path, num_key_value_heads=2)


def test_a_folder_without_safetensors_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_head(HEAD, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: convert it to safetensors"):
        load_eagle_config(tmp_path, target_config(HEAD))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        load_eagle_config(tmp_path, target_config(HEAD))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"norm.weight": None, "midlayer.mlp.up_proj.weight": None},
            r"missing: midlayer\.mlp\.up_proj.weight, norm\.weight",
        ),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(10)}, r"left over: midlayer\.self_attn\.q_norm\.weight"),
        ({"layers.1.mlp.up_proj.weight": torch.ones(50, 36)}, r"left over: layers\.1\.mlp\.up_proj\.weight"),
        (
            {"midlayer.self_attn.q_proj.weight": torch.ones(90, 36)},
            r"q_proj\.weight is \[90, 36\], expected \[90, 72\]",
        ),
        ({"lm_head.weight": torch.ones(41, 36)}, r"lm_head\.weight is \[41, 36\], expected \[40, 36\]"),
        ({"fc.weight": torch.ones(36, 108, dtype=torch.int8)}, r"fc\.weight is I8"),
        ({"d2t": None}, "no tensor d2t, and its draft_vocab_size is 40 of 101 tokens"),
        ({"d2t": torch.zeros(41, dtype=torch.int64)}, r"d2t in .* is \[41\] of I64, expected \[40\] of I32 or I64"),
        ({"d2t": torch.zeros(40)}, r"\[40\] of F32"),
        ({"d2t": torch.full((40,), 62)}, "tokens from 62 to 101; the target has 101"),
        ({"d2t": torch.full((40,), -1)}, "tokens from -1 to 38"),
        ({"d2t": -torch.arange(40)}, "some token of the target twice"),
        ({"d2t": torch.zeros(40, dtype=torch.int64)}, "d2t and t2d in .* name different tokens"),
        ({"t2d": torch.ones(102, dtype=torch.bool)}, r"t2d in .* is \[102\] of BOOL, expected \[101\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, **tensors)


def test_a_mapping_of_all_tokens_must_leave_them_where_they_are(tmp_path: Path) -> None:
    head = HEADS["all tokens"]
    assert "draft_columns" not in load(tmp_path, head, t2d=torch.zeros(VOCAB_SIZE, dtype=torch.bool))
    moved = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    moved[0], moved[1] = 1, -1
    with pytest.raises(CheckpointError, match="moves tokens although draft_vocab_size is the target's, 101"):
        load(tmp_path, head, d2t=moved)


def test_a_mapping_in_32_bits_is_the_same(tmp_path: Path) -> None:
    wide = load(tmp_path / "wide")
    d2t = write_head(HEAD, tmp_path / "narrow")["d2t"]
    narrow = load(tmp_path / "narrow", d2t=d2t.to(torch.int32))
    np.testing.assert_array_equal(narrow["draft_columns"], wide["draft_columns"])


def test_needless_tensors_are_ignored(tmp_path: Path) -> None:
    expected = load(tmp_path)
    actual = load(tmp_path, **{"midlayer.self_attn.rotary_emb.inv_freq": torch.zeros(5)})
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_layout_of_speculators_is_read_as_the_published_one(tmp_path: Path) -> None:
    head = HEADS["speculators"]
    write_head(head, tmp_path / "one")
    config = load_eagle_config(tmp_path / "one", target_config(head))
    assert (config.norm_before_residual, config.layer_prefix, config.has_embedding) == (True, "layers.0.", True)
    assert config.model.ropes[0].theta == PUBLISHED["rope_theta"]

    changed = replace(head, config=speculators_config(norm_before_residual=False, **{LAYER_IDS: [1, 3, 6]}))
    write_head(changed, tmp_path / "other")
    config = load_eagle_config(tmp_path / "other", target_config(head))
    assert (config.norm_before_residual, config.captured_layers) == (False, (1, 3, 6))

    silent = {name: value for name, value in head.config.items() if name != "norm_before_residual"}
    write_config(silent, tmp_path / "one")
    assert load_eagle_config(tmp_path / "one", target_config(head)).norm_before_residual, "what vLLM takes it for"

    of_qwen = PUBLISHED | {"model_type": "qwen3"}
    write_head(replace(head, config=speculators_config(transformer_layer_config=of_qwen)), tmp_path / "qwen")
    with pytest.raises(UnsupportedModelError, match="model_type 'qwen3'"):
        load_eagle_config(tmp_path / "qwen", target_config(head))


def test_a_config_of_another_file_is_not_mistaken_for_one(tmp_path: Path) -> None:
    write_config({"model_type": "llama"}, tmp_path)
    with pytest.raises(UnsupportedModelError, match="is not an EAGLE-3 head: its architecture is unnamed"):
        load_eagle_config(tmp_path, target_config(HEAD))
