"""Routing picks the k largest, and the experts' sum does not depend on how they are grouped."""

import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.experts import grouped, reference
from quire.models.config import MoeConfig
from quire.models.moe import moe_mlp, route
from quire.models.parallel import ALONE
from tests.models.helpers import quick_jit


def routing_weights(logits, moe: MoeConfig):
    """[T, E]: what `route` gives, token by expert."""
    ids, weights = route(logits, moe)
    is_chosen = ids[:, :, None] == jnp.arange(moe.num_experts)[None, None, :]
    return jnp.sum(jnp.where(is_chosen, weights[:, :, None], jnp.float32(0)), axis=1)


def expected_weights(logits: np.ndarray, moe: MoeConfig) -> np.ndarray:
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    # Stable sort: of equal probabilities the lower index comes first.
    ranks = np.argsort(np.argsort(-probs, axis=-1, kind="stable"), axis=-1, kind="stable")
    kept = np.where(ranks < moe.num_experts_per_tok, probs, 0)
    return kept / kept.sum(-1, keepdims=True) if moe.norm_topk_prob else kept


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 4), (7, 3), (9, 1)])
def test_routing_is_the_top_k_of_the_softmax(num_experts: int, k: int, norm_topk_prob: bool) -> None:
    moe = MoeConfig(num_experts, k, 8, norm_topk_prob)
    logits = np.random.default_rng(num_experts).standard_normal((400, num_experts)).astype(np.float32)
    logits[200:] = np.round(logits[200:])  # many ties
    weights = np.asarray(quick_jit(lambda logits: routing_weights(logits, moe))(logits))
    np.testing.assert_allclose(weights, expected_weights(logits, moe), atol=1e-6)
    assert ((weights > 0).sum(-1) == moe.num_experts_per_tok).all()


def test_of_equal_experts_the_first_are_chosen() -> None:
    weights = quick_jit(lambda logits: routing_weights(logits, MoeConfig(7, 3, 8)))(np.zeros((3, 7), np.float32))
    np.testing.assert_allclose(weights, np.tile([1 / 3] * 3 + [0] * 4, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_of_experts_add_up_to_all_of_them(dtype: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoeConfig(num_experts=6, num_experts_per_tok=3, intermediate_size=10)
    rng = np.random.default_rng(0)
    shapes = {
        "router": (9, 6),
        "experts_gate_proj": (6, 9, 10),
        "experts_up_proj": (6, 9, 10),
        "experts_down_proj": (6, 10, 9),
    }
    layer = {name: jnp.asarray(rng.standard_normal(shape) / 3, dtype) for name, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal((4, 9)), dtype)
    whole = quick_jit(lambda x: moe_mlp(x, layer, moe, "silu", reference.run_experts, ALONE))(x)
    assert whole.dtype == dtype
    for group_size in (1, 5):  # 5 is no divisor of 6: groups of 3
        monkeypatch.setattr(reference, "MAX_INTERMEDIATE_ELEMENTS", group_size * 4 * 10)
        grouped = quick_jit(lambda x: moe_mlp(x, layer, moe, "silu", reference.run_experts, ALONE))
        assert "stablehlo.while" in grouped.lower(x).as_text(), "the experts were not grouped"
        np.testing.assert_allclose(grouped(x), whole, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("held", [(0, 8), (2, 5)], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_that_compute_their_own_tokens_equal_experts_that_compute_all(dtype: np.dtype, held) -> None:
    """Also where a device holds some of them, and where one has no token."""
    rng = np.random.default_rng(0)
    first, end = held
    num_tokens, num_experts = grouped.MIN_TOKENS + 9, end - first
    shapes = ((num_experts, 16, 24), (num_experts, 16, 24), (num_experts, 24, 16))
    matrices = tuple(jnp.asarray(rng.standard_normal(shape) / 4, dtype) for shape in shapes)
    ids = np.stack([rng.permutation(8)[:3] for _ in range(num_tokens)])
    ids = jnp.asarray(np.where(ids == 3, 7, ids) - first, jnp.int32)  # nobody goes to number 3
    weights = jnp.asarray(rng.random((num_tokens, 3)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((num_tokens, 16)), dtype)
    outs = [
        np.asarray(quick_jit(lambda x, run=run: run(x, ids, weights, matrices, activate=jnp.tanh))(x))
        for run in (grouped.run_experts, reference.run_experts)
    ]
    # The weight is applied after the last product in one and before it in the other: bfloat16 rounds at other places.
    np.testing.assert_allclose(
        *outs, rtol=1e-5 if dtype == jnp.float32 else 3e-2, atol=1e-5 if dtype == jnp.float32 else 3e-2
    )


def test_an_impossible_number_of_experts_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 4\].*not 5"):
        MoeConfig(num_experts=4, num_experts_per_tok=5, intermediate_size=8)
