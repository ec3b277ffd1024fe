"""What the compiled steps are: the cache is donated and never copied, every batch has a shape, nothing is compiled late."""

import re

import jax
import numpy as np
import pytest

from quire.backends.base import ShapeLimits, StepShape
from quire.backends.cpu import CpuBackend
from quire.engine import LLM, SamplingParams
from quire.engine.input_batch import ShapeChooser
from quire.kernels.sampling.rows import SamplingMode
from tests.engine.engines import (
    XLA_KERNELS,
    FewShapesBackend,
    check_idle,
    generate,
    tiny_engine,
    tiny_folder,
    token_ids,
)

# Large enough that a copy of the cache would stand out from everything else in the program.
NUM_BLOCKS = 4000


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The CPU's own shapes, in full."""
    return LLM(
        str(tiny_folder()),
        load_format="dummy",
        max_num_seqs=4,
        max_model_len=256,
        num_kv_blocks=NUM_BLOCKS,
        dtype="float32",
        seed=5,
    )


def _cache_shape_in_hlo(cache: jax.Array) -> str:
    names = {"float32": "f32", "uint16": "u16", "bfloat16": "bf16"}
    return f"{names[cache.dtype.name]}[{','.join(map(str, cache.shape))}]"


def assert_cache_is_never_copied(llm: LLM) -> None:
    caches = jax.tree.leaves(llm.core.runner.state.kv_cache)
    total = sum(cache.nbytes for cache in caches)
    for shape, program in llm.core.runner.programs.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= total, f"{shape.describe()}: the cache is not updated in place"
        copy = re.compile(rf"= {re.escape(_cache_shape_in_hlo(caches[0]))}\S* copy\(")
        copies = [line for line in program.as_text().splitlines() if copy.search(line)]
        assert not copies, f"{shape.describe()}: {copies[:2]}"
        assert memory.temp_size_in_bytes < total / 2, f"{shape.describe()}: {memory.temp_size_in_bytes} of {total}"


def test_no_program_copies_the_cache(llm: LLM) -> None:
    assert_cache_is_never_copied(llm)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"decode_steps_per_dispatch": 2}])
def test_no_program_copies_the_cache_in_other_forms(settings: dict) -> None:
    arguments = {"max_num_seqs": 4, "max_model_len": 256, "num_kv_blocks": NUM_BLOCKS, "dtype": "float32", **settings}
    assert_cache_is_never_copied(LLM(str(tiny_folder()), load_format="dummy", backend=FewShapesBackend(), **arguments))


def test_the_check_finds_a_copy() -> None:
    """A program that returns its cache unchanged in one place and written in another has to copy it."""
    cache = jax.ShapeDtypeStruct((2000, 16, 6, 10), np.float32)
    program = jax.jit(lambda c: (c.at[0].set(1.0), c[::-1]), donate_argnums=0).lower(cache).compile()
    assert program.memory_analysis().temp_size_in_bytes > 0 or "copy(" in program.as_text()


def test_nothing_is_compiled_after_warm_up_whatever_is_asked(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 101, n).tolist() for n in (1, 40, 200, 7, 90, 3)]
    num_compilations = llm.stats().num_compilations
    # The slot update is one more, where no engine of this process had an equal one.
    assert num_compilations >= len(llm.core.runner.programs)
    common = {"max_tokens": 6, "detokenize": False}
    for params in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "logprobs": 3},
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"temperature": 0.5, "allowed_token_ids": [4, 5, 6], "n": 3},
    ):
        for count in (1, 3, 6):
            llm.generate(prompts[:count], SamplingParams(**common, **params), use_tqdm=False)
            check_idle(llm)
    assert llm.stats().num_compilations == num_compilations


def test_padded_equals_unpadded(llm: LLM) -> None:
    """The CPU's shapes fit closely, the tests' two shapes pad everything to the widest."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 101, n).tolist() for n in (1, 33, 70, 5)]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=12, ignore_eos=True, detokenize=False)
        for i, t in enumerate((0.0, 1.0, 0.7, 0.0))
    ]
    padded = generate(tiny_engine(enable_prefix_caching=False), prompts, params)
    for count in (1, 2, 4):
        assert token_ids(generate(llm, prompts[:count], params[:count])) == token_ids(padded[:count])


def test_a_late_compilation_is_counted(llm: LLM) -> None:
    counter = llm.core.runner.compilations
    before = counter.num_after_warm_up
    with counter.counting():
        jax.jit(lambda x: x * 17 + 3)(np.ones(7, np.float32))
    assert counter.num_after_warm_up == before + 1
    counter.num_after_warm_up = before


@pytest.mark.parametrize(
    "limits", [(1, 1, 32, 16, 1), (1, 8, 2048, 16, 1), (32, 8, 2048, 16, 1), (5, 3, 700, 7, 4), (256, 16, 8192, 32, 2)]
)
def test_every_batch_within_the_limits_has_a_shape(limits: tuple[int, ...]) -> None:
    bounds = ShapeLimits(*limits)
    backend = CpuBackend()
    shapes = backend.step_shapes(bounds)
    chooser = ShapeChooser(shapes, bounds.block_size)
    blocks = -(-bounds.max_model_len // bounds.block_size)
    rng = np.random.default_rng(1)
    for _ in range(300):
        tiles = int(rng.integers(0, bounds.max_prefill_tiles + 1))
        need = StepShape(
            decode_rows=int(rng.integers(0 if tiles else 1, bounds.max_num_seqs + 1)),
            prefill_tiles=tiles,
            tile_size=backend.capabilities.tile_size,
            context_blocks=int(rng.integers(1, blocks + 1)),
            num_decode_steps=1 if tiles else int(rng.choice([1, bounds.decode_steps_per_dispatch])),
            sampling=SamplingMode(int(rng.integers(0, 3))),
        )
        assert chooser.choose(need).covers(need)
    with_prompt = StepShape(bounds.max_num_seqs, bounds.max_prefill_tiles, 32, blocks, 1, SamplingMode.FULL, True)
    assert chooser.choose(with_prompt).covers(with_prompt)
    assert len(shapes) == len(set(shapes))


def test_padding_is_counted_where_it_is_computed() -> None:
    """A short prompt in a tile of 32, then 7 decode steps of one row in a program of four."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    for kernels in (None, XLA_KERNELS):
        llm = tiny_engine(kernels=kernels)
        before = llm.stats()
        generate(llm, [[5, 6, 7]], [params])
        after = llm.stats()
        assert after.num_real_tokens - before.num_real_tokens == 3 + 7
        padding = after.num_padding_tokens - before.num_padding_tokens
        assert padding == 0 if llm.core.plan.ops.is_padding_free else padding >= (32 - 3) + 7 * 3
