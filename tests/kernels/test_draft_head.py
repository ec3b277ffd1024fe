"""A head's entries in C++ equal those that are composed of reference ops, and nothing is written for what is not used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.draft_head import cpu
from quire.kernels.errors import KernelUnavailableError
from quire.kernels.linear import cpu as linear_cpu
from quire.kernels.linear import reference as linear_reference
from quire.kernels.ops import COMPOSED, REFERENCE, choose_ops
from quire.kernels.paged_attention.contract import StepPlaces, TokenMajor
from quire.kernels.paged_attention.reference import write_kv
from quire.models.config import ModelConfig, RopeConfig
from quire.models.eagle import (
    EagleConfig,
    fuse_features,
    head_keys_values,
    head_rope,
    head_spec,
    init_eagle_params,
)
from quire.models.params import ParamSpec
from tests.kernels.linear_suite import FORMATS, bits
from tests.kernels.native import CONTEXT, EACH_INSTRUCTION_SET, needs
from tests.models.helpers import quick_jit

NUM_TOKENS, BLOCK_SIZE, NUM_BLOCKS = 41, 4, 20
MATRICES = ("fc", "k_proj", "v_proj")
# Features, keys and values are of about unit size. Measured over all cases: float32 1.2e-6, bfloat16 and int8 the same bits; there is room
# for a number that another processor rounds the other way.
TOLERANCE = {"float32": 5e-6, "bfloat16": 0.02, "int8": 0.05}


def head(*, biased: bool, hidden_size: int = 48, head_dim: int = 10) -> EagleConfig:
    """Widths that fill no panel of a matrix and no vector, three captured layers of another width, and half of each head rotated."""
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=hidden_size,
        num_layers=1,
        num_heads=6,
        num_kv_heads=3,
        head_dim=head_dim,
        intermediate_size=8,
        max_position_embeddings=64,
        attention_scale=0.5,
        ropes=(RopeConfig(theta=1e4, rotary_dim=head_dim // 2 // 2 * 2),),
        rope_indices=(0,),
        sliding_windows=(None,),
        qkv_bias=biased,
    )
    return EagleConfig(
        model=model,
        target_hidden_size=20,
        captured_layers=(0, 1, 2),
        draft_vocab_size=64,
        has_embedding=True,
    )


class Case:
    """Random tokens of a step for a head, some of which are used, each with a place of its own; padding's is in the null block."""

    def __init__(self, config: EagleConfig, format: str, used: np.ndarray) -> None:
        self.config, self.format, self.used = config, format, used
        self.dtype = jnp.dtype("bfloat16" if format == "int8" else format)
        rng = np.random.default_rng(3)
        width = len(config.captured_layers) * config.target_hidden_size
        self.captured = jnp.asarray(rng.normal(size=(NUM_TOKENS, width)), self.dtype)
        self.embeddings = jnp.asarray(rng.normal(size=(NUM_TOKENS, config.model.hidden_size)), self.dtype)
        self.positions = jnp.asarray(rng.integers(0, 60, NUM_TOKENS), jnp.int32)
        free = BLOCK_SIZE + rng.permutation((NUM_BLOCKS - 1) * BLOCK_SIZE)[:NUM_TOKENS]
        places = np.where(used, free, 0).astype(np.int32)
        self.places = StepPlaces(jnp.asarray(places // BLOCK_SIZE), jnp.asarray(places % BLOCK_SIZE), [])
        shape = TokenMajor().shape(NUM_BLOCKS, BLOCK_SIZE, config.model.num_kv_heads, config.model.head_dim)
        cache = jnp.asarray(rng.normal(size=shape), self.dtype)
        is_bfloat16 = self.dtype == jnp.bfloat16
        self.cache = jax.lax.bitcast_convert_type(cache, jnp.uint16) if is_bfloat16 else cache

    def params(self, instruction_set: str | None) -> dict:
        """The same values however the matrices are held; norms and biases are not left at 1 and 0."""

        def place(spec: ParamSpec, array: np.ndarray):
            quantization = "int8" if self.format == "int8" else "none"
            if spec.name in MATRICES:
                if instruction_set is not None:
                    return linear_cpu.prepare(instruction_set, array, quantization)
                return linear_reference.prepare(array, quantization)
            if array.ndim == 1:
                rng = np.random.default_rng(len(spec.name))
                array = (array.astype(np.float32) + 0.3 * rng.normal(size=array.shape)).astype(array.dtype)
            return jnp.asarray(array)

        return init_eagle_params(self.config, 0, self.dtype, place=place)

    def native(self, instruction_set: str) -> tuple[np.ndarray, np.ndarray]:
        def run(params, captured, embeddings, positions, cache, places, used):
            rope = head_rope(self.config, positions)
            spec = head_spec(self.config)
            return cpu.head_entries(instruction_set, params, captured, embeddings, rope, cache, places, used, spec)

        return self._run(run, self.params(instruction_set))

    def composed(self) -> tuple[np.ndarray, np.ndarray]:
        def run(params, captured, embeddings, positions, cache, places, used):
            features = fuse_features(params, captured)
            k, v = head_keys_values(params, self.config, embeddings, features, positions)
            return features, write_kv(cache, k, v, places)

        return self._run(run, self.params(None))

    def _run(self, function, params) -> tuple[np.ndarray, np.ndarray]:
        arguments = (self.captured, self.embeddings, self.positions, self.cache, self.places, jnp.asarray(self.used))
        features, cache = quick_jit(function)(params, *arguments)
        return np.asarray(features), np.asarray(cache)


def numbers(array: np.ndarray) -> np.ndarray:
    return (array.view(jnp.bfloat16) if array.dtype == np.uint16 else array).astype(np.float32)


SOME = np.random.default_rng(0).random(NUM_TOKENS) < 0.6
USED = {"some": SOME, "one": np.arange(NUM_TOKENS) == 17, "none": np.zeros(NUM_TOKENS, bool), "all": SOME | True}


@pytest.mark.parametrize("instruction_set", EACH_INSTRUCTION_SET)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("biased", [False, True])
def test_native_entries_equal_composed_ones(biased: bool, used: str, format: str, instruction_set: str) -> None:
    case = Case(head(biased=biased), format, USED[used])
    features, cache = case.native(instruction_set)
    expected_features, expected_cache = case.composed()
    assert features.dtype == expected_features.dtype
    where = case.used
    difference = np.abs(numbers(features[where]) - numbers(expected_features[where]))
    assert difference.max(initial=0.0) <= TOLERANCE[format]
    # The null block holds what padding left there, which is nobody's.
    assert np.abs(numbers(cache[1:]) - numbers(expected_cache[1:])).max() <= TOLERANCE[format]
    changed = (bits(cache) != bits(np.asarray(case.cache))).reshape(NUM_BLOCKS, BLOCK_SIZE, -1).any(axis=-1)
    assert changed.sum() == where.sum(), "only used entries' places change, and nothing is written for padding"


@needs("portable")
def test_entries_do_not_depend_on_what_else_is_in_the_step() -> None:
    """Bit for bit, or what a head drafts would hang on the requests beside it."""
    config = head(biased=True)
    alone, beside = (Case(config, "float32", USED[name]).native("portable") for name in ("one", "all"))
    token = int(np.flatnonzero(USED["one"])[0])
    assert (bits(alone[0][token]) == bits(beside[0][token])).all()
    case = Case(config, "float32", USED["one"])
    place = int(case.places.write_blocks[token]), int(case.places.write_offsets[token])
    assert (bits(alone[1][place]) == bits(beside[1][place])).all()


@needs("portable")
def test_native_entries_without_native_products_are_an_error() -> None:
    """Their matrices are packed by the linear op."""
    with pytest.raises(KernelUnavailableError, match="needs a native linear too, not reference"):
        choose_ops(CONTEXT, {"head_entries": "native_portable", "linear": REFERENCE})
    assert choose_ops(CONTEXT, {"linear": REFERENCE}).head_entries.name == COMPOSED
