"""What drafting rests on: samplers with the same noise mostly agree and never bend the target's distribution; repeated text is found.

R rows, L places for tokens, K drafts.
"""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from quire.backends.base import StepShape
from quire.engine.device_state import DeviceState, empty_slots
from quire.engine.drafting import DecodeRows, DraftStep, NgramDrafter, Weights, latest_match
from tests.engine.acceptance_table import NUM_DRAWS, agreement, draw, pairs

# One chance in ten thousand per check; the draws are fixed, so a check that passes once always passes.
MIN_P_VALUE = 1e-4
PAIRS = [pytest.param(idx, p, q, id=name.replace(" ", "_")) for idx, (name, p, q) in enumerate(pairs())]


def assert_drawn_from(token_ids: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square over the tokens that are expected at least five times; those that cannot be drawn were not."""
    counts = np.bincount(token_ids, minlength=len(probabilities))
    expected = probabilities * NUM_DRAWS
    assert counts[probabilities < 1e-12].sum() == 0
    often = expected >= 5
    if often.sum() > 1:
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        kept = wanted > 0
        assert stats.chisquare(observed[kept], wanted[kept], sum_check=False).pvalue > MIN_P_VALUE


@pytest.mark.parametrize(("idx", "p", "q"), PAIRS)
def test_drafts_are_accepted_as_often_as_promised_and_the_target_is_what_is_emitted(
    idx: int, p: np.ndarray, q: np.ndarray
) -> None:
    found = agreement(p, q, first_seed=1000 * idx)
    assert found.bound - 4 * found.standard_error <= found.rate <= found.optimum + 4 * found.standard_error
    np.testing.assert_array_equal(found.emitted, draw(p, 1000 * idx))
    assert_drawn_from(found.emitted, p)
    assert_drawn_from(found.drafted, q)


def test_equal_distributions_always_agree() -> None:
    (_, p, q), *_ = pairs()
    assert agreement(p, q, 7).rate == 1.0


def test_with_noise_of_its_own_a_draft_would_agree_less() -> None:
    """Guards the law above: it is the noise that they share which does it."""
    _, p, q = list(pairs())[5]
    shared = agreement(p, q, 0)
    apart = (draw(q, 500_000) == draw(p, 0)).mean()
    assert apart < shared.bound - 0.3
    assert apart == pytest.approx((p * q).sum(), abs=0.02)


# ---- what followed when the last tokens stood in the text before

NUM_ROWS, NUM_PLACES, MAX_DRAFTS = 4, 24, 6
MAX_LOOKUP, MIN_LOOKUP = 4, 2
match = jax.jit(latest_match, static_argnames="max_tokens")
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=NUM_PLACES) | st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 4)
).map(lambda part: part[0] * part[1])
TEXTS = st.lists(TEXT, min_size=NUM_ROWS, max_size=NUM_ROWS)


def longest_latest(text: list[int], max_tokens: int) -> tuple[int, int]:
    """The place after the match, and the match's length; (0, 0) where the last token is new."""
    for length in range(min(max_tokens, len(text) - 1), 0, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                return place, length
    return 0, 0


def continued(text: list[int], source: int, count: int) -> list[int]:
    """What follows when the text from `source` on is copied to its end token by token, the copies included."""
    longer = list(text)
    for place in range(source, source + count):
        longer.append(longer[place])
    return longer[len(text) :]


def rows_of(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [R, L], and behind each text what an earlier request or rejected drafts have left there; lengths [R]."""
    left = np.random.default_rng(3).integers(0, 4, (len(texts), NUM_PLACES)).astype(np.int32)
    for row, text in zip(left, texts, strict=True):
        row[: len(text)] = text
    return left, np.array([len(text) for text in texts], np.int32)


@settings(max_examples=300)
@given(texts=TEXTS, max_tokens=st.sampled_from([1, 2, 4, 8]))
@example(texts=[[0], [1, 1], [0, 1, 0], [2] * NUM_PLACES], max_tokens=8)
def test_the_longest_and_latest_match_is_found(texts: list[list[int]], max_tokens: int) -> None:
    sources, lengths = map(np.asarray, match(*rows_of(texts), max_tokens))
    for text, source, length in zip(texts, sources.tolist(), lengths.tolist(), strict=True):
        expected_source, expected_length = longest_latest(text, max_tokens)
        assert length == expected_length
        if length:
            assert source == expected_source


DRAFTER = NgramDrafter(MIN_LOOKUP, MAX_LOOKUP)
SHAPE = StepShape(NUM_ROWS + 1, 0, 8, 1, num_drafts=MAX_DRAFTS)
SLOT_IDS = np.array([2, 0, 3, NUM_ROWS, 1], np.int32)  # in any order, one of them padding


@partial(jax.jit, static_argnames="shape")
def draft(slots, limits, shape):
    rows = DecodeRows.of(slots, SLOT_IDS, np.zeros((len(SLOT_IDS), 1), np.int32))
    state, counts = DRAFTER.draft(DraftStep(shape, 8, Weights(None), rows), DeviceState(None, slots), limits)
    return state.slots, counts


@settings(max_examples=200)
@given(
    texts=st.lists(TEXT.map(lambda text: text[: NUM_PLACES - 1]), min_size=NUM_ROWS, max_size=NUM_ROWS),
    limits=st.lists(st.integers(-1, MAX_DRAFTS), min_size=NUM_ROWS, max_size=NUM_ROWS),
)
def test_what_followed_before_is_drafted_round_and_round(texts: list[list[int]], limits: list[int]) -> None:
    """Drafts stand behind the text, which they leave as it is; a shorter match than the least, or no room, is no draft."""
    tokens, lengths = rows_of(texts)
    # As the step has it: never more than one less than there is room for.
    limits = [min(limit, NUM_PLACES - len(text) - 1) for limit, text in zip(limits, texts, strict=True)]
    slots = empty_slots(NUM_ROWS, NUM_PLACES, 4)
    slots = slots.replace(
        tokens=np.concatenate([tokens, slots.tokens[-1:]]),
        num_tokens=np.append(lengths, 0).astype(np.int32),
        max_total_tokens=np.append(np.full(NUM_ROWS, NUM_PLACES), 0).astype(np.int32),
    )
    in_order = np.array([(limits + [-1])[slot] for slot in SLOT_IDS], np.int32)
    after, counts = draft(slots, in_order, SHAPE)
    found = np.asarray(after.tokens)
    for row, slot in enumerate(SLOT_IDS.tolist()):
        if slot == NUM_ROWS:
            assert counts[row] == 0
            continue
        text = texts[slot]
        source, length = longest_latest(text, MAX_LOOKUP)
        expected = continued(text, source, max(limits[slot], 0)) if length >= MIN_LOOKUP else []
        assert counts[row] == len(expected)
        end = len(text) + len(expected)
        assert found[slot, :end].tolist() == [*text, *expected]
        np.testing.assert_array_equal(found[slot, end:], tokens[slot, end:])
    np.testing.assert_array_equal(after.num_tokens, slots.num_tokens)
