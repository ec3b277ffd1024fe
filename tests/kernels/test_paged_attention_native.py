"""The C++ kernels pass the suite of paged attention, for every instruction set that this machine has.

Beside the suite's own cases: what a kernel that works on tiles of 64 keys and panels of 32 numbers could get wrong.
"""

from functools import partial

import numpy as np
import pytest

from quire.kernels.paged_attention import cpu
from tests.kernels.native import needs
from tests.kernels.paged_attention_suite import Case, PagedAttentionConformance, make_problem

LONG = ((200, 3), (63, 1), (64, 2), (127, 3), (0, 70))  # beyond several tiles, and up to, at and across their borders


def _both_dtypes(name: str, rows: tuple[tuple[int, int], ...], **shape) -> list[Case]:
    return [
        Case(name, rows, **shape),
        Case(f"{name}_bfloat16", rows, **shape, dtype="bfloat16", cache_dtype="uint16"),
    ]


CASES = [
    # Not a multiple of a panel, of a vector, of a word of anything.
    *(case for h in (8, 10, 14, 24, 72, 256) for case in _both_dtypes(f"head_dim_{h}", ((66, 3), (5, 1)), head_dim=h)),
    *(
        case
        for g in (1, 3, 8)
        for case in _both_dtypes(f"group_of_{g}", ((70, 2), (0, 5)), num_heads=2 * g, num_kv_heads=2)
    ),
    *_both_dtypes("several_tiles", LONG),
    *(case for w in (1, 2, 5, 8) for case in _both_dtypes(f"width_{w}", ((130, w), (62, w), (0, w)))),
    *(case for s in (1, 63, 64, 65) for case in _both_dtypes(f"window_of_{s}", LONG, sliding_window=s)),
    *_both_dtypes("soft_cap_over_tiles", LONG, soft_cap=1.5),
    *_both_dtypes("window_and_soft_cap_over_tiles", LONG, sliding_window=65, soft_cap=3.0),
    *(case for size in (1, 16, 17, 64) for case in _both_dtypes(f"blocks_of_{size}", LONG, block_size=size)),
]
EVERY_HEAD_DIM = [case for h in range(8, 257, 8) for case in _both_dtypes(f"head_dim_{h}", ((66, 3),), head_dim=h)]


class NativeConformance(PagedAttentionConformance):
    """The suite and the cases above; a subclass says which instruction set."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_attends_right_where_tiles_and_panels_end(self, case: Case) -> None:
        self.test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", EVERY_HEAD_DIM, ids=lambda case: case.name)
    def test_attends_right_with_every_head_dim(self, case: Case) -> None:
        self.test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_scores_of_any_size_give_weights_that_sum_to_one(self, dtype: str) -> None:
        """Values of one everywhere come out as one, whether a key takes all the weight or all share it."""
        case = Case("large", ((70, 2), (3, 1)), dtype=dtype, cache_dtype="uint16" if dtype == "bfloat16" else None)
        for size in (1e-20, 1.0, 1e4, 1e15):
            problem = make_problem(case)
            problem.q *= np.float32(size)
            problem.v[:] = 1
            problem.cache[:, :, 1::2] = np.where(np.isnan(problem.cache[:, :, 1::2]), np.nan, 1)
            out, _ = self.run(case, problem)
            for row, (_, new) in enumerate(case.rows):
                # Measured 5e-7 at most in float32, and nothing in bfloat16, where one is the nearest number to all such.
                np.testing.assert_allclose(out[row, :new], 1, atol=2e-6)


@needs("avx512bf16")
class TestAvx512Bf16(NativeConformance):
    write_kv = staticmethod(partial(cpu.write_kv, "avx512bf16"))
    attention = staticmethod(partial(cpu.paged_attention, "avx512bf16"))


@needs("avx512")
class TestAvx512(NativeConformance):
    write_kv = staticmethod(partial(cpu.write_kv, "avx512"))
    attention = staticmethod(partial(cpu.paged_attention, "avx512"))


@needs("avx2")
class TestAvx2(NativeConformance):
    write_kv = staticmethod(partial(cpu.write_kv, "avx2"))
    attention = staticmethod(partial(cpu.paged_attention, "avx2"))


@needs("portable")
class TestPortable(NativeConformance):
    write_kv = staticmethod(partial(cpu.write_kv, "portable"))
    attention = staticmethod(partial(cpu.paged_attention, "portable"))
