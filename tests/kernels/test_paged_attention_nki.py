"""The NKI kernels pass the suite of paged attention on the emulator, by the rules of each generation of NeuronCore.

Beside the suite's own cases: tiles of 512 keys made of gathers of 128, heads of one and of several contractions, group sizes and widths.
"""

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quire.kernels.errors import KernelUnavailableError, NkiError
from quire.kernels.nki import Simulation, load_emulated, official_nki, simulate
from quire.kernels.nki.loading import run_emulated
from quire.kernels.op import OpContext
from quire.kernels.ops import NKI, NKI_EMULATED, REFERENCE, choose_ops
from quire.kernels.paged_attention import nki
from quire.kernels.paged_attention.nki_plan import plan_for
from tests.kernels.paged_attention_suite import Case, PagedAttentionConformance, Problem, expected_output, make_problem

LONG = ((600, 1), (127, 1), (511, 1), (0, 1), (0, 0))  # several tiles, up to and across their ends; padding
BF16 = {"dtype": "bfloat16"}

CASES = [
    Case("several_tiles", LONG, block_size=16),
    Case("several_tiles_bfloat16", LONG, block_size=16, **BF16),
    *(Case(f"head_dim_{h}_bfloat16", ((140, 1), (5, 1)), head_dim=h, block_size=32, **BF16) for h in (64, 80, 96, 128)),
    *(Case(f"head_dim_{h}", ((140, 2), (5, 1)), head_dim=h, block_size=32) for h in (64, 256)),
    *(Case(f"group_of_{g}", ((140, 2), (0, 2)), num_heads=2 * g, block_size=16, **BF16) for g in (1, 3, 8)),
    *(Case(f"width_{w}", ((130, w), (62, w), (0, w)), block_size=16, **BF16) for w in (1, 4, 8)),
    *(Case(f"blocks_of_{b}", ((200, 2), (1, 1)), block_size=b, **BF16) for b in (8, 24, 64, 128)),
    Case("window_over_tiles", ((600, 3), (129, 2)), block_size=16, sliding_window=130),
    Case("window_within_a_gather", ((600, 3), (129, 2)), block_size=16, sliding_window=5, **BF16),
    Case("several_groups_of_heads", ((600, 1), (130, 1)), num_heads=14, num_kv_heads=7, block_size=16, **BF16),
    Case("two_heads_of_64_lanes", ((140, 8),), num_heads=12, num_kv_heads=2, block_size=16),
    Case("one_head_of_128_lanes", ((140, 8),), num_heads=16, num_kv_heads=1, block_size=16),
    Case("tiles_of_three_gathers", ((500, 1),), num_heads=9, num_kv_heads=9, head_dim=256, block_size=32),
    # Tiles of a prompt: as many lots per head as its group has heads, or half of them, and a lot that is not full.
    Case("prefill_tile", ((0, 128), (500, 128), (0, 0)), num_heads=8, head_dim=64, block_size=32, **BF16),
    *(
        Case(f"prefill_head_dim_{h}", ((70, 128), (0, 3)), head_dim=h, block_size=32, **BF16)
        for h in (80, 96, 128, 256)
    ),
    *(Case(f"prefill_group_of_{g}", ((130, 64), (0, 64)), num_heads=2 * g, block_size=16) for g in (1, 3, 8)),
    *(Case(f"prefill_blocks_of_{b}", ((200, 128), (1, 77)), block_size=b, **BF16) for b in (8, 24, 64, 128)),
    *(Case(f"prefill_width_{w}", ((130, w), (5, w - 9)), num_heads=6, block_size=16) for w in (33, 43, 100)),
    Case("prefill_window", ((600, 128), (0, 128)), block_size=16, sliding_window=130),
    Case("prefill_window_within_a_gather", ((600, 40),), block_size=16, sliding_window=5, soft_cap=3.0),
    Case("rows_of_several_pieces", ((100, 300), (0, 129), (0, 0)), block_size=16),
    Case("soft_cap_over_tiles", ((600, 1),), block_size=16, soft_cap=1.5),
]
CONTEXT = OpContext("neuron", "NC_v2", "bfloat16", num_heads=8, num_kv_heads=2, head_dim=128, block_size=32)


LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of an element, relative to the row's largest."""


class NkiConformance(PagedAttentionConformance):
    """The suite; a subclass says which generation is emulated."""

    writes_padding = False

    def check_output(self, case: Case, problem: Problem, out: np.ndarray) -> None:
        super().check_output(case, problem, out)
        for row, (_, new) in enumerate(case.rows):
            expected = expected_output(case, problem, row, case.head_dim**-0.5)
            error = np.abs(out[row, :new] - expected).max(initial=0)
            assert error <= LARGEST_ERROR[case.dtype] * np.abs(expected).max(initial=0), error


class TestGen2(NkiConformance):
    write_kv = partial(nki.write_kv, launch=nki.on_emulator("gen2"))
    attention = partial(nki.paged_attention, launch=nki.on_emulator("gen2"))

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_attends_right_where_tiles_and_parts_end(self, case: Case) -> None:
        self.test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)

    def test_a_row_of_nan_does_not_reach_its_neighbours(self) -> None:
        """Their products go through the same tiles of SBUF and PSUM."""
        case = Case("poisoned", ((200, 1), (200, 1)), block_size=16)
        problem = make_problem(case)
        clean, _ = self.run(case, problem)
        problem.k[0], problem.v[0], problem.q[0] = np.nan, np.nan, np.nan
        poisoned, _ = self.run(case, problem)
        assert np.isnan(poisoned[0]).all()
        np.testing.assert_array_equal(poisoned[1], clean[1])

    def test_a_window_that_is_an_array_equals_one_that_is_a_number(self) -> None:
        """As it is where layers of different windows are scanned."""
        case = Case("window", ((200, 2), (3, 1)), block_size=16, sliding_window=70)
        problem = make_problem(case)
        expected, _ = self.run(case, problem)
        out, _ = self.run(replace(case, sliding_window=jnp.int32(70)), problem)
        np.testing.assert_array_equal(out, expected)


class TestGen3(NkiConformance):
    write_kv = partial(nki.write_kv, launch=nki.on_emulator("gen3"))
    attention = partial(nki.paged_attention, launch=nki.on_emulator("gen3"))


def _official(kernel: str, *arguments: Any) -> np.ndarray:
    package, _ = official_nki()
    return package.simulate(package.jit(getattr(importlib.import_module(nki.KERNELS), kernel)))(*arguments)


@pytest.mark.skipif(official_nki()[0] is None, reason=official_nki()[1])
class TestOfficialSimulator(NkiConformance):
    """The same kernels and cases on AWS's own simulator."""

    write_kv = partial(nki.write_kv, launch=nki.through_callback(_official))
    attention = partial(nki.paged_attention, launch=nki.through_callback(_official))


class Gen4(NkiConformance):
    write_kv = partial(nki.write_kv, launch=nki.on_emulator("gen4"))
    attention = partial(nki.paged_attention, launch=nki.on_emulator("gen4"))


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_gen4_attends_right(case: Case) -> None:
    Gen4().test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "uint16"}, "uint16"),
        ({"num_heads": 9}, "9 query heads"),
        ({"head_dim": 129}, "head_dim 129"),
        ({"num_heads": 512, "num_kv_heads": 512, "head_dim": 256}, "SBUF"),
        ({}, None),
    ],
)
def test_what_the_kernels_cannot_serve_is_said(changes: dict, reason: str | None) -> None:
    said = nki.refuses_model(replace(CONTEXT, **changes))
    assert said is None if reason is None else reason in str(said)


def emulate_bfloat16(rows: int, num_keys: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Simulation:
    """One decode step over rows of `num_keys` keys each."""
    simulations = []

    def launch(name: str, result: Any, arguments: tuple[Any, ...]) -> jax.Array:
        values = [np.asarray(x) if isinstance(x, jax.Array) else x for x in arguments]
        simulations.append(simulate(getattr(load_emulated(nki.KERNELS), name), *values))
        return jnp.asarray(simulations[-1].output)

    blocks = rows * num_keys // 32
    cache = jnp.zeros((1 + blocks, 32, 2 * num_kv_heads, head_dim), jnp.bfloat16)
    tables = 1 + jnp.arange(blocks, dtype=jnp.int32).reshape(rows, -1)
    q = jnp.ones((rows, 1, num_heads, head_dim), jnp.bfloat16)
    lens = jnp.full((rows,), num_keys, jnp.int32)
    nki.paged_attention(q, cache, tables, lens, jnp.ones_like(lens), scale=1.0, launch=launch)
    return simulations[0]


def test_each_key_is_fetched_once_and_little_else() -> None:
    """What a decoded token costs by the emulator's count, for one core's share of a model of 8 key/value heads of 128."""
    simulation = emulate_bfloat16(rows=2, num_keys=2048, num_heads=16, num_kv_heads=4, head_dim=128)
    keys_and_values = 2 * 2048 * (2 * 4 * 128) * 2  # bytes
    assert keys_and_values <= simulation.costs.dma_bytes < 1.02 * keys_and_values
    assert simulation.costs.dma_descriptors < 1.3 * 2 * 2048
    bound = keys_and_values / simulation.generation.hbm_bytes_per_s
    least = simulation.least_seconds()
    assert least is not None
    assert bound < least < 1.5 * bound, "ScalarE decides, and less in longer rows: it clears the buffers once for each"


MUTATIONS = [
    # What is taken out of the kernels, what is put there, the rule that this breaks.
    ("    nisa.activation(dst=buffers, op=nl.copy, data=zero.broadcast(1, size))\n", "", "uninitialised"),
    (", oob_mode=nisa.oob_mode.skip", "", "indirect-bounds"),
    ("accumulate=j > 0", "accumulate=True", "matmul-accumulate"),
    ("nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype", "dtype", "transpose-dtype"),
    ("", "", "start-partition"),  # of heads that take 16 lanes each, which nki.py never asks for
    ("bias=tile_max,\n", "bias=-1.0,\n", "activation-bias"),
    (
        "num_heads, num_keys), kv.dtype, buffer=nl.sbuf",
        "num_heads, num_keys), nl.float32, buffer=nl.sbuf",
        "matmul-dtype",
    ),
    ("lanes), transposed_dtype(kv.dtype), buffer=nl.psum", "lanes), kv.dtype, buffer=nl.sbuf", "transpose-space"),
    ("ROWS = 128", "ROWS = 256", "partitions"),
    ("nisa.tensor_copy(dst=weights_t, src=in_psum)", "nisa.dma_copy(dst=weights_t, src=in_psum)", "dma-space"),
    ("BUFFERS = 2", "BUFFERS = 128", "sbuf-capacity"),
]


@pytest.mark.parametrize(("text", "instead", "rule"), MUTATIONS, ids=[rule for _, _, rule in MUTATIONS])
def test_a_kernel_made_wrong_is_refused(text: str, instead: str, rule: str) -> None:
    """The emulator sees in these very kernels what it is there to see."""
    path = Path(nki.__file__).with_name("nki_kernels.py")
    source = path.read_text(encoding="utf-8")
    assert text in source
    lane = 16 if rule == "start-partition" else 32
    kernels = run_emulated(source.replace(text, instead), str(path))
    rng = np.random.default_rng(0)
    q, cache = (rng.normal(size=s).astype(ml_dtypes.bfloat16) for s in ((1, 64, 1, 2, lane), (33, 16, 4, 64)))
    key_idx = np.arange(512, dtype=np.int32).reshape(1, 4, 128).transpose(0, 2, 1)
    slots = np.where(key_idx < 300, key_idx, np.int32(33 * 16))
    bounds = np.tile(np.array([0, 300], np.float32), (1, 2 * lane, 1))
    with pytest.raises(NkiError) as caught:
        simulate(kernels.attention, q, cache, slots, bounds, 0.125, 0.0, False, 4)
    assert caught.value.rule == rule
    assert caught.value.place.startswith(str(path))


def test_they_serve_only_where_their_self_test_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the emulator only where it is asked for by name."""
    assert choose_ops(CONTEXT).paged_attention.name == choose_ops(CONTEXT).write_kv.name == REFERENCE
    assert "nki: AWS's nki is not installed" in choose_ops(CONTEXT).paged_attention.describe()
    monkeypatch.setattr(nki, "official_nki", lambda: (nki, "installed"))
    assert "nki: their self-test was not run" in choose_ops(CONTEXT).write_kv.describe()
    with pytest.raises(KernelUnavailableError, match="self-test was not run"):
        choose_ops(CONTEXT, {"paged_attention": NKI})
    passed = replace(CONTEXT, nki_self_test=None)
    assert choose_ops(passed).paged_attention.name == choose_ops(passed).write_kv.name == NKI
    assert nki.refuses(replace(passed, platform="cpu")) == "needs a NeuronCore"
    assert choose_ops(CONTEXT, {"paged_attention": NKI_EMULATED}).paged_attention.name == NKI_EMULATED


@pytest.mark.parametrize("name", ["several_tiles", "window_over_tiles", "prefill_window", "tiles_of_three_gathers"])
def test_a_plan_counts_all_the_sbuf_that_the_kernel_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)  # of more than one tile
    peaks, plans = [], []

    def simulator(name: str, *arguments: Any) -> np.ndarray:
        simulation = simulate(getattr(load_emulated(nki.KERNELS), name), *arguments)
        peaks.append(simulation.costs.peak_sbuf_bytes)
        return simulation.output

    monkeypatch.setattr(nki, "plan_for", lambda *a, **n: plans.append(plan_for(*a, **n)) or plans[-1])
    problem = make_problem(case)
    arrays = [jnp.asarray(np.nan_to_num(x), case.dtype) for x in (problem.q, problem.cache)]
    lens = map(jnp.asarray, (problem.tables, problem.seq_lens, problem.query_lens))
    launch = nki.through_callback(simulator)
    nki.paged_attention(
        *arrays, *lens, scale=1.0, sliding_window=case.sliding_window, launch=launch
    ).block_until_ready()
    assert peaks[-1] <= plans[-1].sbuf_bytes <= 3 * peaks[-1]
