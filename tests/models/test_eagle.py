"""EAGLE-3 heads compute what their description says, from the files they are published in, on one device or several."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from quire.backends.cpu import CpuBackend
from quire.backends.stablehlo_lint import lint
from quire.engine.loading import WeightPlacement
from quire.kernels.sampling.logits import MASKED
from quire.models.config import ModelConfig, RopeConfig
from quire.models.decoder import Attend, KVCache, LayerInfo
from quire.models.eagle import (
    EagleConfig,
    abstract_eagle_params,
    default_captured_layers,
    eagle_specs,
    embed_for_head,
    fuse_features,
    head_forward,
    head_keys_values,
    head_logits,
    init_eagle_params,
)
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from quire.models.parallel import ALONE, MODEL_AXIS, Parallel, held_shape, partition, read_held
from quire.models.params import Params, init_params
from tests.models.heads import (
    HEADS,
    HIDDEN_SIZE,
    VOCAB_SIZE,
    Head,
    draft_vocab_size,
    reference_features,
    reference_hidden,
    reference_logits,
    write_head,
)
from tests.models.helpers import dense_attend, quick_jit, random_ids

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="the reference is written in torch")
NUM_TOKENS, NUM_DRAFTS = 11, 4


def target_config(head: Head) -> ModelConfig:
    layers = head.target_layers
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB_SIZE,
        hidden_size=head.target_hidden_size,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=8,
        max_position_embeddings=64,
        attention_scale=0.5,
        ropes=(RopeConfig(theta=1e4, rotary_dim=4),),
        rope_indices=(0,) * layers,
        sliding_windows=(None,) * layers,
    )


def loaded(head: Head, folder: Path) -> tuple[EagleConfig, Params, dict[str, Any]]:
    tensors = write_head(head, folder)
    config = load_eagle_config(folder, target_config(head))
    return config, load_eagle_params(folder, config, np.float32), tensors


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def caching_attend(config: ModelConfig, positions: Array) -> Attend:
    """Attention of tokens at `positions` to a cache of one array row per position, their own among them."""

    def attend(q: Array, k: Array, v: Array, kv_cache: KVCache, info: LayerInfo) -> tuple[Array, KVCache]:
        assert info.layer_idx == 0
        keys, values = (whole.at[positions].set(new) for whole, new in zip(kv_cache, (k, v), strict=True))
        grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[2])
        scores = jnp.einsum("tkgh,skh->kgts", grouped, keys) * jnp.float32(config.attention_scale)
        seen = jnp.arange(keys.shape[0], dtype=jnp.int32)[None, :] <= positions[:, None]
        probs = jax.nn.softmax(jnp.where(seen[None, None], scores, MASKED), axis=-1)
        return jnp.einsum("kgts,skh->tkgh", probs, values).reshape(q.shape), (keys, values)

    return attend


def empty_cache(num_positions: int) -> tuple[Array, Array]:
    # Not zeros: an entry that is read before it is written would go unnoticed.
    return (jnp.full((num_positions, 3, 10), 7.0), jnp.full((num_positions, 3, 10), 7.0))


@needs_torch
@pytest.mark.parametrize("name", HEADS)
def test_a_head_drafts_as_the_reference_does(name: str, tmp_path: Path) -> None:
    """Prefill of a sequence, then one token at a time: its own output is the next feature, its best token the next embedding."""
    head = HEADS[name]
    config, params, tensors = loaded(head, tmp_path)
    captured = normal(1, NUM_TOKENS, head.num_captured * head.target_hidden_size)
    ids = random_ids(VOCAB_SIZE, NUM_TOKENS + 1)[1:]
    table = tensors["embed_tokens.weight"].numpy() if head.has_embedding else normal(2, VOCAB_SIZE, HIDDEN_SIZE)
    target_params = {"embed_tokens": jnp.asarray(normal(2, VOCAB_SIZE, head.target_hidden_size))}
    size = draft_vocab_size(head)
    target_ids = np.arange(size) + (tensors["d2t"].numpy() if "d2t" in tensors else 0)

    @quick_jit
    def step(features: Array, ids: Array, positions: Array, kv_cache: KVCache) -> tuple[Array, Array, KVCache]:
        embeddings = embed_for_head(params, config, target_params, ids)
        attend = caching_attend(config.model, positions)
        hidden, kv_cache = head_forward(params, config, embeddings, features, positions, kv_cache, attend)
        return hidden, head_logits(params, config, hidden), kv_cache

    features = fuse_features(params, jnp.asarray(captured))
    expected_features = reference_features(tensors, captured)
    np.testing.assert_allclose(features, expected_features, atol=1e-4)
    kv_cache, new_ids = empty_cache(NUM_TOKENS + NUM_DRAFTS), ids
    positions = np.arange(NUM_TOKENS, dtype=np.int32)
    for _ in range(NUM_DRAFTS):
        hidden, logits, kv_cache = step(features, new_ids, positions[-len(new_ids) :], kv_cache)
        expected_hidden = reference_hidden(tensors, head, table[ids], expected_features, positions)
        expected = reference_logits(tensors, expected_hidden)
        np.testing.assert_allclose(hidden, expected_hidden[-len(new_ids) :], atol=1e-4)
        np.testing.assert_allclose(logits[:, target_ids], expected[-len(new_ids) :], atol=1e-4)
        assert (np.delete(np.asarray(logits), target_ids, axis=1) == MASKED).all()
        assert logits.shape[1] == VOCAB_SIZE
        best = target_ids[expected[-1].argmax()]
        assert logits[-1].argmax() == best
        features, expected_features = hidden[-1:], np.concatenate([expected_features, expected_hidden[-1:]])
        ids, new_ids = np.append(ids, best).astype(np.int32), np.asarray([best], np.int32)
        positions = np.append(positions, positions[-1] + 1).astype(np.int32)
    assert len(set(ids[-NUM_DRAFTS:])) > 1, "a head that always drafts one token shows little"


@needs_torch
@pytest.mark.parametrize("name", ["published", "speculators"])
def test_keys_and_values_alone_fill_the_cache_as_the_whole_layer_does(name: str, tmp_path: Path) -> None:
    config, params, _ = loaded(HEADS[name], tmp_path)
    embeddings, features = (jnp.asarray(normal(seed, NUM_TOKENS, HIDDEN_SIZE)) for seed in (3, 4))
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)

    def run(first: int, kv_cache: KVCache) -> tuple[Array, KVCache]:
        attend = caching_attend(config.model, positions[first:])
        return head_forward(params, config, embeddings[first:], features[first:], positions[first:], kv_cache, attend)

    whole, cache_of_whole = run(0, empty_cache(NUM_TOKENS))
    before = slice(0, NUM_TOKENS - 1)
    filled = head_keys_values(params, config, embeddings[before], features[before], positions[before])
    filled = tuple(empty.at[before].set(part) for empty, part in zip(empty_cache(NUM_TOKENS), filled, strict=True))
    last, cache_of_parts = run(NUM_TOKENS - 1, filled)
    np.testing.assert_allclose(last, whole[-1:], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache_of_parts, cache_of_whole)


SMALL = EagleConfig(
    model=ModelConfig(
        architecture="LlamaForCausalLMEagle3",
        vocab_size=61,
        hidden_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        attention_scale=8**-0.5,
        ropes=(RopeConfig(theta=100.0, rotary_dim=8),),
        rope_indices=(0,),
        sliding_windows=(None,),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
    target_hidden_size=20,
    captured_layers=(0, 2, 3),
    draft_vocab_size=33,
    has_embedding=True,
)
CONFIGS = {
    "part of the vocabulary": SMALL,
    "all of it": replace(SMALL, draft_vocab_size=61),
    "the target's embedding": replace(SMALL, has_embedding=False, target_hidden_size=24),
}


def run_head(
    params: Params, config: EagleConfig, target_params: Params, ids: Array, captured: Array, parallel: Parallel = ALONE
) -> tuple[Array, Array]:
    """Hidden states and logits of a sequence."""
    positions = jnp.arange(ids.shape[0], dtype=jnp.int32)
    features = fuse_features(params, captured)
    embeddings = embed_for_head(params, config, target_params, ids, parallel)
    model = replace(config.model, num_kv_heads=max(config.model.num_kv_heads // parallel.size, 1))
    attend = dense_attend(model)
    hidden, _ = head_forward(params, config, embeddings, features, positions, None, attend, parallel)
    return hidden, head_logits(params, config, hidden, parallel)


def inputs_of(config: EagleConfig) -> tuple[Params, Array, Array]:
    num_captured = len(config.captured_layers)
    table = jnp.asarray(normal(5, config.model.vocab_size, config.target_hidden_size))
    captured = jnp.asarray(normal(6, NUM_TOKENS, num_captured * config.target_hidden_size))
    return {"embed_tokens": table}, jnp.asarray(random_ids(config.model.vocab_size, NUM_TOKENS)), captured


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_spread_over_devices_computes_what_one_device_does(name: str, size: int) -> None:
    """The devices are the rows of a vmap, each with what it would read of every parameter."""
    config = CONFIGS[name]
    params = init_eagle_params(config, 0, np.float32)
    target_params, ids, captured = inputs_of(config)
    expected = quick_jit(lambda params, target: run_head(params, config, target, ids, captured))(params, target_params)

    specs = eagle_specs(config)
    embedding = replace(specs["norm"], name="embed_tokens", axes=("vocab", "embed"))

    def parts(spec: Any, array: Array) -> Array:
        tensor = np.asarray(array)
        shape = held_shape(spec, config.model, size, tensor.shape)
        held = read_held(tensor, spec, config.model, size, tuple(slice(None) for _ in shape))
        cut = partition(spec, config.model, size, tensor.ndim)
        if MODEL_AXIS not in cut:
            return jnp.stack([jnp.asarray(held)] * size)
        return jnp.stack(jnp.split(jnp.asarray(held), size, axis=cut.index(MODEL_AXIS)))

    spread = {key: parts(specs[key], array) for key, array in params.items()}
    target = {"embed_tokens": parts(embedding, target_params["embed_tokens"])}
    assert {key for key in spread if (spread[key][0] != spread[key][-1]).any()} >= {"q_proj", "down_proj", "lm_head"}

    def on_each(params: Params, target: Params) -> tuple[Array, Array]:
        return run_head(params, config, target, ids, captured, Parallel(size))

    actual = quick_jit(jax.vmap(on_each, axis_name=MODEL_AXIS))(spread, target)
    for device in range(size):
        jax.tree.map(
            lambda a, b, device=device: np.testing.assert_allclose(a[device], b, atol=1e-5, rtol=1e-5), actual, expected
        )


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 1e-5), ("int8", 0.1)])  # 1e-6, 0.05 seen
def test_the_engine_places_a_head_as_it_places_a_model(quantization: str, tolerance: float) -> None:
    config = SMALL
    backend = CpuBackend()
    mesh = backend.make_mesh(1)
    ops = backend.select_ops(config.model, "float32", quantization, 16, mesh.size, {})
    placement = WeightPlacement(config.model, np.dtype(np.float32), ops, quantization, mesh, backend.memory)
    target_params, ids, captured = inputs_of(config)
    placed = init_eagle_params(config, 0, np.float32, place=placement.place)
    if quantization == "int8":
        forms = {key for key, value in placed.items() if not isinstance(value, jax.Array)}
        assert forms == {"fc", "lm_head", *(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down"))}
    expected = run_head(init_eagle_params(config, 0, np.float32), config, target_params, ids, captured)
    actual = jax.jit(lambda params: run_head(params, config, target_params, ids, captured))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), actual, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_program_holds_nothing_that_neuron_lacks(name: str) -> None:
    config = CONFIGS[name]
    params = abstract_eagle_params(config, jnp.bfloat16)
    target_params, ids, captured = inputs_of(config)
    target_params, captured = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (target_params, captured))
    program = jax.jit(lambda *args: run_head(args[0], config, *args[1:])).lower(params, target_params, ids, captured)
    assert [finding.describe() for finding in lint(program).errors] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_describes_the_parameters(name: str) -> None:
    config = CONFIGS[name]
    params, abstract = init_eagle_params(config, 0, jnp.bfloat16), abstract_eagle_params(config, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    for spec in eagle_specs(config).values():
        assert not spec.is_per_layer, spec.name
        assert params[spec.key].shape == spec.shape
        assert len(spec.axes) == len(spec.shape), spec.name


def test_random_parameters_depend_on_the_seed() -> None:
    first, again, other = (init_eagle_params(SMALL, seed, np.float32) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["fc"] != other["fc"]).any()
    assert (first["k_proj"] != first["v_proj"]).any()


def test_a_random_head_has_logits_of_about_unit_variance_also_after_many_drafts() -> None:
    config = replace(SMALL, draft_vocab_size=61, captured_layers=(1, 2, 3))
    params = init_eagle_params(config, 0, np.float32)
    features, ids = jnp.asarray(normal(8, 1, 24)), jnp.asarray([5], jnp.int32)
    for position in range(5):
        embeddings = embed_for_head(params, config, {}, ids)
        attend = dense_attend(config.model)
        features, _ = head_forward(
            params, config, embeddings, features, jnp.asarray([position], jnp.int32), None, attend
        )
        logits = head_logits(params, config, features)
        assert 0.5 < np.std(logits) < 2
        ids = logits.argmax(-1).astype(jnp.int32)


def test_a_draft_vocabulary_is_spread_over_the_target_s_without_repetition() -> None:
    columns = np.asarray(init_eagle_params(SMALL, 0, np.float32)["draft_columns"])
    assert columns.shape == (61,)
    assert sorted(columns[columns >= 0]) == list(range(33))


def test_embeddings_for_a_head_are_not_scaled_and_clipped_to_the_vocabulary() -> None:
    """Gemma multiplies its own by the root of the hidden size; heads are trained on the table as it is."""
    config = CONFIGS["the target's embedding"]
    target = replace(config.model, embedding_scale=24**0.5)
    table = init_params(target, 0, np.float32, stacked=True)["embed_tokens"]
    params = init_eagle_params(config, 0, np.float32)
    ids = jnp.asarray([-3, 7, 10**6], jnp.int32)
    embeddings = embed_for_head(params, config, {"embed_tokens": table}, ids)
    np.testing.assert_array_equal(embeddings, np.asarray(table)[[0, 7, 60]])


def test_the_captured_layers_by_default_are_an_early_the_middle_and_a_late_one() -> None:
    assert default_captured_layers(32) == (2, 16, 29)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captured_layers": (3, 2, 1)}, r"ascending order, not \(3, 2, 1\)"),
        ({"captured_layers": ()}, "ascending order"),
        ({"draft_vocab_size": 62}, r"\[1, 61\] \(vocab_size\), not 62"),
        ({"has_embedding": False}, "hidden_size 24 cannot read the embedding of a target of hidden_size 20"),
        ({"model": replace(SMALL.model, num_layers=2, rope_indices=(0, 0), sliding_windows=(None,) * 2)}, "one layer"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
