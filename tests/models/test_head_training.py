"""How an EAGLE-3 head is trained: on what the target writes itself, unrolled as it drafts, and written as it is published."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.kernels.sampling.logits import MASKED
from quire.models.config import ModelConfig, RopeConfig
from quire.models.decoder import LayerInfo
from quire.models.eagle import (
    DRAFT_COLUMNS,
    draft_columns,
    embed_for_head,
    fuse_features,
    head_forward,
    head_logits,
    init_eagle_params,
)
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from quire.models.params import init_params
from quire.models.training.batches import Sampler
from quire.models.training.continuations import (
    as_stream,
    continuations,
    frequent_tokens,
    make_continue_rows,
)
from quire.models.training.export import export_head, head_config, hf_head_config
from tests.models.helpers import all_logprobs, quick_jit, random_ids

V, L = 48, 18
TARGET = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=V, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=24, max_position_embeddings=64, attention_scale=8**-0.5, ropes=(RopeConfig(theta=10000.0, rotary_dim=8),),
    rope_indices=(0,) * 4, sliding_windows=(None,) * 4, tie_word_embeddings=True,
)  # fmt: skip
TARGET_JSON = {
    "vocab_size": V, "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
SIZE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
}
TARGET_IDS = np.asarray(sorted({0, 1, 2, 3, 4, 5, *range(7, 40, 3)}))
RAW = hf_head_config(SIZE, TARGET_JSON, len(TARGET_IDS), (1, 2, 4))
HEAD = head_config(RAW, TARGET)


@cache
def target_params() -> Any:
    return init_params(TARGET, 0, "float32", stacked=False)


@cache
def continue_rows() -> Any:
    return make_continue_rows(TARGET)


def test_a_greedy_continuation_is_the_best_token_after_each_token() -> None:
    prompts = random_ids(V, 8).reshape(2, 4)
    rows = continue_rows()(
        target_params(), jnp.asarray(np.pad(prompts, ((0, 0), (0, L - 4)))), jnp.asarray([4, 2]), jnp.zeros(2), jax.random.key(0)
    )  # fmt: skip
    for row, prompt, given in zip(np.asarray(rows), prompts, (4, 2), strict=True):
        np.testing.assert_array_equal(row[:given], prompt[:given])
        best = all_logprobs(target_params(), TARGET, row).argmax(axis=-1)
        np.testing.assert_array_equal(row[given:], best[given - 1 : -1])


def test_a_sampled_continuation_follows_the_distribution() -> None:
    num_rows = 4000
    rows = jnp.zeros((num_rows, 3), jnp.int32)
    sampled = continue_rows()(
        target_params(), rows, jnp.full(num_rows, 2), jnp.full(num_rows, 0.5, jnp.float32), jax.random.key(1)
    )
    p = np.exp(all_logprobs(target_params(), TARGET, np.zeros(2, np.int32))[-1] / 0.5)
    p /= p.sum()
    seen = np.bincount(np.asarray(sampled)[:, 2], minlength=V) / num_rows
    assert np.abs(seen - p).max() < 5 * np.sqrt(p.max() / num_rows)
    assert seen.max() < 0.9, "one token alone shows little"


def test_continuations_begin_as_their_prompts_do_and_repeat_for_a_seed() -> None:
    prompts = random_ids(V, 5 * 9).reshape(5, 9)
    first, again = (continuations(continue_rows(), target_params(), prompts, L, 3, rows_per_call=2) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, :8], prompts[:, :8])
    assert (first[:, 9:] != first[:1, 9:]).any()


def test_the_head_s_tokens_are_the_most_frequent_ones_in_order() -> None:
    ids, share = frequent_tokens(np.asarray([[7, 7, 2], [9, 9, 7], [4, 1, 2]]), 3, 12)
    np.testing.assert_array_equal(ids, [2, 7, 9])
    assert share == 7 / 9


def test_a_stream_of_continuations_gives_rows_that_begin_with_one() -> None:
    rows = np.arange(200, dtype=np.int32).reshape(20, 10)
    sampler = Sampler({"own": as_stream(rows)}, seed=0, weights={"own": 1.0})
    assert (sampler.batch(0, 6, 10)[:, 0] % 10 == 0).all()


@cache
def step_parts() -> Any:
    """The module, which needs optax."""
    pytest.importorskip("optax", reason="training needs the extra quire[train]")
    from quire.models.training import head_step

    return head_step


def head_params() -> Any:
    return init_eagle_params(HEAD, 1, np.float32) | {DRAFT_COLUMNS: jnp.asarray(draft_columns(TARGET_IDS, V))}


def drafts_one_at_a_time(params: Any, ids: np.ndarray, captured: np.ndarray, chain: int, num_drafts: int) -> np.ndarray:
    """Log-probabilities [J, Vd] of one chain as the engine computes them: entries in a cache, then one entry after the other."""

    def entries(features: jax.Array, positions: np.ndarray, kv_cache: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, kv_cache: Any, info: LayerInfo) -> Any:
            keys, values = (
                jnp.concatenate([old, new]) if len(old) else new for old, new in zip(kv_cache, (k, v), strict=True)
            )
            groups = q.shape[1] // k.shape[1]
            scores = jnp.einsum("tnh,snh->nts", q, jnp.repeat(keys, groups, axis=1)) * jnp.float32(8**-0.5)
            visible = jnp.arange(len(keys))[None, :] <= jnp.asarray(positions)[:, None]
            weights = jax.nn.softmax(jnp.where(visible[None], scores, MASKED), axis=-1)
            return jnp.einsum("nts,snh->tnh", weights, jnp.repeat(values, groups, axis=1)), (keys, values)

        embeddings = embed_for_head(params, HEAD, target_params(), jnp.asarray(ids[positions + 1]))
        return head_forward(params, HEAD, embeddings, features, jnp.asarray(positions, jnp.int32), kv_cache, attend)

    features = fuse_features(params, jnp.asarray(captured[: chain + 1]))
    hidden, kv_cache = entries(features, np.arange(chain + 1), ((), ()))
    results = []
    for draft in range(num_drafts):
        if draft:
            hidden, kv_cache = entries(hidden[-1:], np.asarray([chain + draft]), kv_cache)
        logits = np.asarray(head_logits(params, HEAD, hidden[-1:]))[0, TARGET_IDS]
        results.append(jax.nn.log_softmax(logits))
    return np.asarray(results)


@pytest.mark.slow
def test_what_is_trained_is_what_the_head_drafts() -> None:
    """Every chain of a batch at once is each chain alone, from the cache that drafting has there."""
    parts = step_parts()
    rows = random_ids(V, 2 * L).reshape(2, L)
    params = head_params()
    teacher = parts.Teacher(TARGET, target_params(), TARGET_IDS)
    captured, log_p = quick_jit(lambda rows: parts.teach(teacher, HEAD, rows))(rows)
    np.testing.assert_allclose(log_p[1], all_logprobs(target_params(), TARGET, rows[1]), atol=1e-4)
    together = quick_jit(
        lambda rows, captured: parts.unrolled_log_probs(params, HEAD, target_params(), rows, captured, 3)
    )(rows, captured)
    for row, chain in ((0, 0), (1, 5), (1, L - 4)):
        alone = drafts_one_at_a_time(params, rows[row], np.asarray(captured[row]), chain, 3)
        np.testing.assert_allclose([log_q[row, chain] for log_q in together], alone, atol=1e-4)


@pytest.mark.slow
def test_the_loss_of_a_draft_is_the_cross_entropy_two_tokens_after_its_feature() -> None:
    parts = step_parts()
    rows = random_ids(V, L).reshape(1, L)
    params = head_params()
    teacher = parts.Teacher(TARGET, target_params(), TARGET_IDS)
    losses = quick_jit(lambda rows: parts.unrolled_losses(params, HEAD, teacher, rows, 2))(rows)
    captured, log_p = parts.teach(teacher, HEAD, jnp.asarray(rows))
    log_q = parts.unrolled_log_probs(params, HEAD, target_params(), jnp.asarray(rows), captured, 2)
    for draft in range(2):
        expected = [
            -np.sum(np.exp(log_p[0, chain + draft + 1])[TARGET_IDS] * log_q[draft][0, chain]) for chain in range(L - 2)
        ]
        np.testing.assert_allclose(losses[draft], np.mean(expected), rtol=1e-4)


def test_a_few_steps_bring_the_head_nearer_to_its_target() -> None:
    parts = step_parts()
    teacher = parts.Teacher(TARGET, target_params(), TARGET_IDS)
    rows = jnp.asarray(random_ids(V, 4 * L).reshape(4, L))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as optax relies on
        params = {name: leaf for name, leaf in head_params().items() if name != DRAFT_COLUMNS}
        optimizer = parts.make_head_optimizer(params)
        state, step = (params, optimizer.init(params)), parts.make_head_step(HEAD, teacher, optimizer)
        losses = []
        for _ in range(12):
            state, loss = step(state, target_params(), rows, jnp.float32(1.0))
            losses.append(np.asarray(loss))
    assert np.isfinite(losses).all()
    assert (losses[-1] < losses[0]).all()


def test_a_head_that_was_written_is_read_back(tmp_path: Path) -> None:
    params = head_params()
    export_head(tmp_path / "head", params, HEAD, RAW, TARGET_IDS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "head", "model.safetensors"]
    assert load_eagle_config(tmp_path / "head", TARGET) == HEAD
    read = load_eagle_params(tmp_path / "head", HEAD, jnp.bfloat16)
    written = {name: leaf if name == DRAFT_COLUMNS else leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    jax.tree.map(np.testing.assert_array_equal, read, written)


def test_a_head_of_the_whole_vocabulary_is_written_and_read_back_too(tmp_path: Path) -> None:
    raw = hf_head_config(SIZE, TARGET_JSON, V, (0, 3))
    head = head_config(raw, TARGET)
    export_head(tmp_path, init_eagle_params(head, 1, np.float32), head, raw, np.arange(V))
    assert load_eagle_config(tmp_path, TARGET) == head
    assert load_eagle_params(tmp_path, head, np.float32)["lm_head"].shape == (16, V)


def test_a_new_head_begins_with_the_target_s_output_matrix() -> None:
    parts = step_parts()
    teacher = parts.Teacher(TARGET, target_params(), TARGET_IDS)
    params = parts.fresh_head(HEAD, teacher, head_params())
    np.testing.assert_array_equal(params["lm_head"].T, target_params()["embed_tokens"][TARGET_IDS])
    narrow = replace(HEAD, target_hidden_size=12, has_embedding=True)
    assert parts.fresh_head(narrow, teacher, head_params())["lm_head"] is not None


def train(folder: Path) -> Any:
    """Three steps of a loop whose step is none that has to be compiled: it adds what it is given to the parameters."""
    from quire.models.training.head_loop import HeadRun, train_head

    def make_step(*_: Any) -> Any:
        def step(state: Any, target_params: Any, rows: Any, factor: Any) -> Any:
            change = factor * jnp.mean(rows.astype(jnp.float32))
            return (jax.tree.map(lambda leaf: leaf + change, state[0]), state[1]), jnp.zeros(2)

        return step

    rows = random_ids(V, 60 * 128).reshape(60, 128)
    sampler = Sampler({"own": as_stream(rows)}, seed=0, weights={"own": 1.0})
    teacher = step_parts().Teacher(TARGET, target_params(), TARGET_IDS)
    folder.mkdir(exist_ok=True)
    run = HeadRun(folder / "head", folder / "state.pickle", HEAD, RAW, teacher, {"text": np.zeros((1, L), np.int32)})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quire.models.training.head_loop.make_head_step", make_step)
        patched.setattr("quire.models.training.head_loop.make_agreement", lambda *_: lambda *_: np.ones((2, 8, L - 2)))
        return train_head(run, sampler, steps=3, save_every=1, seed=0)


def test_an_interrupted_run_goes_on_to_the_same_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step_parts()
    from quire.models.training import head_loop

    caplog.set_level("INFO", logger="quire.train_eagle")
    whole = train(tmp_path / "whole")
    assert (
        "held out, text: best token of each draft is the target's: 100.0 %, 100.0 %; tokens a round 3.00" in caplog.text
    )

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(head_loop, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    assert not (tmp_path / "parts" / "head").exists()
    resumed = train(tmp_path / "parts")
    assert "resuming at step 1" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    files = [tmp_path / name / "head" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_agreement_of_a_head_with_its_target_is_counted_row_by_row() -> None:
    """As many rows as there are come back, and a head's first drafts agree where its best token is the target's."""
    parts = step_parts()
    from quire.models.training.head_loop import agreements

    teacher = parts.Teacher(TARGET, target_params(), TARGET_IDS)
    params, rows = head_params(), random_ids(V, 3 * L).reshape(3, L)
    agreed = agreements(parts.make_agreement(HEAD, teacher, 2), params, target_params(), rows)
    assert agreed.shape == (2, 3, L - 2)
    captured, log_p = parts.teach(teacher, HEAD, jnp.asarray(rows))
    chosen = TARGET_IDS[np.argmax(drafts_one_at_a_time(params, rows[2], np.asarray(captured[2]), 4, 2), axis=-1)]
    np.testing.assert_array_equal(agreed[:, 2, 4], chosen == np.argmax(log_p[2, 5:7], axis=-1))
