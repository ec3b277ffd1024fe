"""What holds for the decoder itself, whatever attends: layouts, padding, the cache, what it may be compiled to."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from quire.backends.stablehlo_lint import lint
from quire.models.config import ModelConfig, MoeConfig, RopeConfig
from quire.models.decoder import NO_WINDOW, KVCache, LayerInfo, compute_logits, forward
from quire.models.params import Params, abstract_params, init_params, param_specs
from tests.models.helpers import all_logprobs, dense_attend, quick_jit, random_ids

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=61,
    hidden_size=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    intermediate_size=40,
    max_position_embeddings=128,
    attention_scale=10**-0.5,
    ropes=(RopeConfig(theta=100.0, rotary_dim=10),),
    rope_indices=(0, 0, 0),
    sliding_windows=(None, None, None),
)
GEMMA = replace(
    LLAMA,
    architecture="Gemma3ForCausalLM",
    ropes=(RopeConfig(theta=100.0, rotary_dim=10), RopeConfig(theta=1000.0, rotary_dim=10)),
    rope_indices=(0, 1, 0),
    sliding_windows=(4, None, 4),
    qk_norm=True,
    post_norms=True,
    norm_unit_offset=True,
    activation="gelu_tanh",
    tie_word_embeddings=True,
    embedding_scale=24**0.5,
    final_soft_cap=5.0,
    attention_soft_cap=5.0,
)
MIXTRAL = replace(LLAMA, architecture="MixtralForCausalLM", moe=MoeConfig(4, 2, 16), sliding_windows=(4, 4, 4))
CONFIGS = {"llama": LLAMA, "gemma": GEMMA, "mixtral": MIXTRAL}


@cache
def params_of(name: str, *, stacked: bool) -> Params:
    return init_params(CONFIGS[name], 0, np.float32, stacked=stacked)


@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_layers_equal_unrolled_ones(name: str) -> None:
    config, ids = CONFIGS[name], random_ids(61, 11)
    unrolled = all_logprobs(params_of(name, stacked=False), config, ids)
    scanned = all_logprobs(params_of(name, stacked=True), config, ids)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_told_its_index_and_window_and_passes_the_cache_on(name: str, stacked: bool) -> None:
    config = CONFIGS[name]

    def attend(q: Array, k: Array, v: Array, kv_cache: KVCache, info: LayerInfo) -> tuple[Array, KVCache]:
        assert (q.shape, k.shape, v.shape) == ((5, 6, 10), (5, 2, 10), (5, 2, 10))
        seen = [info.layer_idx, NO_WINDOW if info.sliding_window is None else info.sliding_window, kv_cache["calls"]]
        row = jnp.stack([jnp.asarray(value, jnp.int32) for value in seen])
        log = jax.lax.dynamic_update_slice(kv_cache["log"], row[None], (kv_cache["calls"], jnp.int32(0)))
        return q, {"log": log, "calls": kv_cache["calls"] + 1}

    ids = jnp.arange(5, dtype=jnp.int32)
    kv_cache = {"log": jnp.zeros((3, 3), jnp.int32), "calls": jnp.int32(0)}
    params = params_of(name, stacked=stacked)
    kv_cache = quick_jit(lambda kv_cache: forward(params, config, ids, ids, kv_cache, attend)[1])(kv_cache)
    windows = [NO_WINDOW if window is None else window for window in config.sliding_windows]
    np.testing.assert_array_equal(kv_cache["log"], np.transpose([[0, 1, 2], windows, [0, 1, 2]]))


@pytest.mark.parametrize(("name", "window"), [("llama", None), ("mixtral", 4)])
def test_a_window_that_all_layers_share_stays_static_when_scanned(name: str, window: int | None) -> None:
    told: list[Any] = []

    def attend(q: Array, k: Array, v: Array, kv_cache: KVCache, info: LayerInfo) -> tuple[Array, KVCache]:
        told.append(info.sliding_window)
        return q, kv_cache

    ids = jnp.arange(2, dtype=jnp.int32)
    params = params_of(name, stacked=True)
    jax.eval_shape(lambda ids: forward(params, CONFIGS[name], ids, ids, None, attend)[0], ids)
    assert told == [window] * len(told)


def test_tokens_after_a_sequence_do_not_change_it() -> None:
    ids = random_ids(61, 11)
    params = params_of("mixtral", stacked=False)
    alone = all_logprobs(params, MIXTRAL, ids)
    padded = all_logprobs(params, MIXTRAL, np.concatenate([ids, random_ids(61, 5, seed=1)]))
    np.testing.assert_allclose(padded[:11], alone, atol=1e-5, rtol=0)


def test_positions_matter_only_relative_to_each_other() -> None:
    params, ids = params_of("llama", stacked=False), jnp.asarray(random_ids(61, 7))

    hidden = quick_jit(lambda positions: forward(params, LLAMA, ids, positions, None, dense_attend(LLAMA))[0])
    positions = np.arange(7, dtype=np.int32)
    np.testing.assert_allclose(hidden(positions + 50), hidden(positions), atol=1e-4)
    assert np.abs(hidden(positions * 2) - hidden(positions)).max() > 1e-2


def test_token_ids_out_of_range_are_clipped() -> None:
    params = params_of("llama", stacked=False)
    wild = all_logprobs(params, LLAMA, np.asarray([-5, 3, 10**6], np.int32))
    np.testing.assert_array_equal(wild, all_logprobs(params, LLAMA, np.asarray([0, 3, 60], np.int32)))


def test_logits_are_float32_and_inside_the_soft_cap() -> None:
    params = init_params(GEMMA, 0, jnp.bfloat16, stacked=True)
    hidden = 100 * jnp.ones((3, 24), jnp.bfloat16)
    logits = compute_logits(params, GEMMA, hidden)
    assert logits.dtype == jnp.float32
    assert 4.9 < np.abs(logits).max() <= 5.0


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter(name: str) -> None:
    config, ids = CONFIGS[name], jnp.asarray(random_ids(61, 9))

    @quick_jit
    @jax.grad
    def gradients(params: Params) -> Array:
        positions = jnp.arange(9, dtype=jnp.int32)
        hidden, _, _ = forward(params, config, ids, positions, None, dense_attend(config))
        return jnp.mean(jnp.square(compute_logits(params, config, hidden)))

    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(params_of(name, stacked=True))):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_program_holds_nothing_that_neuron_lacks(name: str, stacked: bool) -> None:
    config = CONFIGS[name]
    ids = jax.ShapeDtypeStruct((5,), jnp.int32)

    def run(params: Params, ids: Array) -> Array:
        hidden, _, _ = forward(params, config, ids, ids, None, dense_attend(config))
        return compute_logits(params, config, hidden)

    program = jax.jit(run).lower(abstract_params(config, jnp.bfloat16, stacked=stacked), ids)
    assert [finding.describe() for finding in lint(program).errors] == []


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_deep_random_model_has_logits_of_about_unit_variance(dtype: np.dtype) -> None:
    num_layers = 30
    config = replace(
        LLAMA,
        num_layers=num_layers,
        rope_indices=(0,) * num_layers,
        sliding_windows=(None,) * num_layers,
        vocab_size=999,
    )
    params = init_params(config, 3, dtype, stacked=True)
    positions = jnp.arange(16, dtype=jnp.int32)

    @quick_jit
    def run(params: Params, ids: Array) -> Array:
        return compute_logits(params, config, forward(params, config, ids, positions, None, dense_attend(config))[0])

    logits = np.asarray(run(params, random_ids(999, 16)))
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2
    assert len(set(logits.argmax(-1))) > 8, "every position predicts the same token"


@pytest.mark.parametrize("name", CONFIGS)
def test_random_parameters_depend_on_seed_and_name_but_not_on_layout(name: str) -> None:
    config = CONFIGS[name]
    stacked, unrolled = params_of(name, stacked=True), params_of(name, stacked=False)
    for layer_idx, layer in enumerate(unrolled["layers"]):
        for key, array in layer.items():
            np.testing.assert_array_equal(array, stacked["layers"][key][layer_idx], err_msg=key)
    other = init_params(config, 1, np.float32, stacked=True)
    assert (np.asarray(other["embed_tokens"]) != np.asarray(stacked["embed_tokens"])).any()
    assert (stacked["layers"]["k_proj"] != stacked["layers"]["v_proj"]).any()
    assert (stacked["layers"]["k_proj"][0] != stacked["layers"]["k_proj"][1]).any()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_describes_the_parameters(name: str, stacked: bool) -> None:
    config, params = CONFIGS[name], params_of(name, stacked=stacked)
    abstract = abstract_params(config, np.float32, stacked=stacked)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    for spec in param_specs(config).values():
        assert len(spec.axes) == len(spec.shape), spec.name
        if not spec.is_per_layer:
            assert params[spec.key].shape == spec.shape
        elif stacked:
            assert params["layers"][spec.key].shape == spec.shape
        else:
            assert all(layer[spec.key].shape == spec.layer_shape for layer in params["layers"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"sliding_windows": (None,)}, "one entry per layer"),
        ({"rope_indices": (0, 0, 1)}, "must lie in"),
        ({"activation": "relu"}, "'relu' is not one of"),
        ({"head_dim": 8}, "at most head_dim"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 5}, "even and positive"),
        ({"rotary_dim": 6, "scaling": "dynamic"}, "not one of default"),
        ({"rotary_dim": 6, "scaling": "longrope", "frequency_divisors": (1.0,)}, "needs 3 frequency divisors"),
    ],
)
def test_a_rope_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(theta=1e4, **fields)
