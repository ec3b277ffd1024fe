"""The thresholds are exact, whatever the floats."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quire.kernels.sampling.threshold import top_k_threshold, top_p_threshold

top_k_of = jax.jit(top_k_threshold)
top_p_of = jax.jit(top_p_threshold)
# Subnormals are left out: XLA flushes them to zero where the device does.
any_float = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)


@hypothesis_settings(max_examples=150)
@given(st.lists(any_float, min_size=16, max_size=16), st.integers(1, 16))
def test_top_k_cuts_at_the_kth_largest_float(values: list[float], k: int) -> None:
    row = np.array([values], np.float32)
    assert top_k_of(row, np.array([k], np.int32))[0] == np.sort(row[0])[-k]


def test_top_k_tells_neighbouring_floats_apart() -> None:
    start = np.float32(-20.0)
    row = np.array([[start, np.nextafter(start, np.float32(0)), np.nextafter(start, np.float32(-30)), -25.0]])
    for k in (1, 2, 3, 4):
        assert top_k_of(row.astype(np.float32), np.array([k], np.int32))[0] == np.sort(row[0])[-k]


def test_every_row_has_its_own_k() -> None:
    values = np.random.default_rng(0).normal(0, 10, (200, 1000)).astype(np.float32)
    k = np.arange(1, 1001, 5, dtype=np.int32)
    assert np.array_equal(top_k_of(values, k), -np.sort(-values, axis=1)[np.arange(200), k - 1])


@hypothesis_settings(max_examples=100)
@given(st.lists(st.integers(0, 2**10), min_size=15, max_size=15), st.integers(1, 2**7))
def test_top_p_keeps_the_smallest_set_that_holds_enough(parts: list[int], share: int) -> None:
    # Multiples of 2**-10 and a share in 2**-7 make every sum exact: no rounding hides a wrong cut.
    weights = np.array([[2**10, *parts]], np.float32) / 2**10
    top_p = share / 2**7
    threshold = np.asarray(top_p_of(weights, np.array([top_p], np.float32)))[0]
    kept = weights[0] >= threshold
    assert weights[0][kept].sum() >= top_p * weights.sum()
    assert weights[0][weights[0] > threshold].sum() < top_p * weights.sum()


def test_top_p_is_never_above_the_largest_weight() -> None:
    weights = np.random.default_rng(1).uniform(0, 1, (50, 300)).astype(np.float32)
    weights[:, 7] = 1
    for top_p in (0.0, 1e-30, 1e-3, 0.5, 1.0):
        threshold = np.asarray(top_p_of(weights, np.full(50, top_p, np.float32)))
        assert (threshold <= 1).all()
        assert (threshold > 0).all()
