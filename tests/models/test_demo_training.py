"""How the demo pair is trained: what goes in, in which order, and that a step learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.models.config import ModelConfig, RopeConfig
from quire.models.params import init_params
from quire.models.training.batches import Sampler, Stream, encode_streams, held_out_rows, token_byte_lengths
from quire.models.training.corpus import Corpus, Exchange, is_held_out
from quire.models.training.schedule import learning_rate_factor, row_length
from quire.models.training.tokenizer import train_tokenizer

CODE = "def first(x):\n    return x[0]\n\n\ndef second(x):\n    return x[1]\n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CODE], vocab_size=320)


def _stream(num_tokens: int) -> Stream:
    return Stream(np.arange(num_tokens, dtype=np.int32), np.arange(0, num_tokens, 50, dtype=np.int64))


def test_about_one_file_in_fifty_is_held_out_whatever_else_there_is() -> None:
    held_out = [name for name in (f"module_{idx}.py" for idx in range(5000)) if is_held_out(name)]
    assert 60 <= len(held_out) <= 140


def test_moved_token_boundaries_leave_the_text_as_it_was(tokenizer) -> None:
    corpus = Corpus({"library": [CODE], "tests": [CODE], "prose": [CODE]})
    plain, moved = (encode_streams(corpus, tokenizer, seed)["library"] for seed in (None, 0))
    assert len(moved.ids) > len(plain.ids)
    assert tokenizer.decode(moved.ids.tolist()) == tokenizer.decode(plain.ids.tolist()) == CODE


def test_every_document_ends_in_the_end_of_text(tokenizer) -> None:
    exchange = Exchange("What is x?", "A name.")
    streams = encode_streams(
        Corpus({"library": [CODE, CODE], "tests": [CODE], "prose": [CODE]}, [exchange]), tokenizer, None
    )
    end = tokenizer.token_to_id("<|endoftext|>")
    assert [int((stream.ids == end).sum()) for stream in streams.values()] == [2, 1, 1, 1]
    assert all(stream.ids[-1] == end for stream in streams.values())
    assert tokenizer.token_to_id("<|end|>") in streams["chat"].ids


def test_rows_of_code_may_begin_at_lines_and_rows_of_chat_only_at_chats(tokenizer) -> None:
    exchanges = [Exchange("What is x?", "A name."), Exchange("What is y?", "Another\nname.")]
    streams = encode_streams(
        Corpus({"library": [CODE, CODE], "tests": [CODE], "prose": [CODE]}, exchanges), tokenizer, None
    )
    assert len(streams["chat"].starts) == 2
    first_words = {tokenizer.decode([streams["library"].ids[start]]) for start in streams["library"].starts}
    assert first_words == {"def", "return", ""}  # the last is the end of a document


def test_an_epoch_shows_every_chunk_once() -> None:
    sampler = Sampler({"library": _stream(1001)}, seed=0)
    num_chunks = 1000 // 100 - 1
    starts = [int(row[0]) for step in range(num_chunks) for row in sampler.batch(step, 1, 100)]
    assert sorted(starts) == [100 * idx for idx in range(num_chunks)]


def test_a_resumed_run_sees_the_rows_that_the_undisturbed_one_sees() -> None:
    streams = {name: _stream(5000) for name in ("library", "tests", "prose", "chat")}
    whole, first = Sampler(streams, seed=3), Sampler(streams, seed=3)
    expected = [whole.batch(step, 4, 64) for step in range(6)]
    [first.batch(step, 4, 64) for step in range(3)]
    resumed = Sampler(streams, seed=3, counters=dict(first.counters))
    for step in range(3, 6):
        np.testing.assert_array_equal(resumed.batch(step, 4, 64), expected[step])


def test_a_chat_row_begins_with_a_chat() -> None:
    sampler = Sampler({"library": _stream(10), "chat": _stream(2001)}, seed=0)
    assert all(row[0] % 50 == 0 for step in range(4) for row in sampler.batch(step, 2, 64))


def test_held_out_rows_do_not_overlap() -> None:
    rows = held_out_rows(_stream(1001), 5, 100)
    assert rows.shape == (5, 101)
    assert len(np.unique(rows[:, 1:])) == 500


def test_a_stream_too_short_for_a_row_gives_none() -> None:
    assert held_out_rows(_stream(50), 5, 100).shape == (0, 101)


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer) -> None:
    text = "naïve 漢字\n    x = 12"
    assert token_byte_lengths(tokenizer)[tokenizer.encode(text).ids].sum() == len(text.encode())


def test_the_learning_rate_rises_stays_and_ends_at_zero() -> None:
    factors = [learning_rate_factor(share / 100) for share in range(101)]
    assert factors[0] == 0.0
    assert factors[10] == factors[30] == 1.0
    assert factors[100] == 0.0
    assert factors[35:] == sorted(factors[35:], reverse=True)
    assert row_length(0.0) < row_length(0.5) < row_length(1.0)


def _tiny(num_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=32, hidden_size=16, num_layers=num_layers, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=64, attention_scale=8**-0.5, ropes=(RopeConfig(theta=10000.0, rotary_dim=8),),
        rope_indices=(0,) * num_layers, sliding_windows=(None,) * num_layers, tie_word_embeddings=True,
    )  # fmt: skip


def test_a_few_steps_teach_both_models_a_pattern() -> None:
    pytest.importorskip("optax", reason="training needs the extra quire[train]")
    from quire.models.training.step import Pair, make_optimizer, make_train_step

    configs = Pair(_tiny(1), _tiny(1))
    # optax relies on the implicit promotion that this test suite forbids
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = configs.map(lambda config: init_params(config, 0, "float32", stacked=False))
        optimizers = params.map(make_optimizer)
        states = params.zip(optimizers).map(lambda pair: (pair[0], pair[1].init(pair[0])))
        step = make_train_step(configs, optimizers)
        target, draft = states.target, states.draft
        rows = jnp.asarray(np.arange(66).reshape(2, 33) % 5, jnp.int32)
        losses = []
        for _ in range(12):
            target, draft, *loss = step(target, draft, rows, jnp.float32(1.0))
            losses.append([float(x) for x in loss])
    assert np.isfinite(losses).all()
    assert np.all(np.array(losses[-1]) < 0.5 * np.array(losses[0]))


def test_attention_in_chunks_is_attention_at_once_and_rows_do_not_mix() -> None:
    pytest.importorskip("optax", reason="training needs the extra quire[train]")
    from quire.models.training import step

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2 * 300, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    out = np.asarray(jax.jit(lambda *qkv: step.dense_attend(2, 0.3)(*qkv, None, None)[0])(q, k, v))
    for row in range(2):
        part = slice(row * 300, (row + 1) * 300)
        keys, values = (np.repeat(x[part], 2, axis=1) for x in (k, v))
        scores = np.einsum("snh,tnh->nst", q[part], keys) * 0.3
        weights = np.exp(scores) * np.tril(np.ones((300, 300)))[None]
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out[part], np.einsum("nst,tnh->snh", weights, values), atol=1e-4)
