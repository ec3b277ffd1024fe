"""The reference passes the suite, with the cache in its own dtype and as bits; the suite fails for wrong attention."""

import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.paged_attention.reference import paged_attention, write_kv
from tests.kernels.paged_attention_suite import CASES, PagedAttentionConformance, make_problem


class TestReference(PagedAttentionConformance):
    write_kv = staticmethod(write_kv)
    attention = staticmethod(paged_attention)


def _queries_reversed(q, *arguments, **options):
    return paged_attention(q, *arguments, **options)[:, ::-1]


def _off_by_one(q, kv_cache, block_tables, seq_lens, query_lens, **options):
    return paged_attention(q, kv_cache, block_tables, seq_lens + 1, query_lens, **options)


@pytest.mark.parametrize("wrong", [_queries_reversed, _off_by_one])
def test_the_suite_catches_wrong_attention(wrong) -> None:
    class Broken(TestReference):
        attention = staticmethod(wrong)

    case = next(case for case in CASES if case.name == "prefill")
    with pytest.raises(AssertionError):
        Broken().test_attends_to_the_rows_history_and_writes_only_the_new_tokens(case)


def test_a_window_given_as_an_array_equals_the_static_one() -> None:
    case = next(case for case in CASES if case.name == "window")
    problem = make_problem(case)
    names = ("q", "cache", "tables", "seq_lens", "query_lens")
    arrays = [jnp.asarray(getattr(problem, name)) for name in names]
    static = paged_attention(*arrays, scale=0.25, sliding_window=5)
    traced = paged_attention(*arrays, scale=0.25, sliding_window=jnp.int32(5))
    np.testing.assert_array_equal(static, traced)
