"""EAGLE-3 heads in the engine: what they draft is what they draft over a whole sequence without a cache, and changes no token."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.engine import LLM, RequestOutput, SamplingParams
from quire.engine.step_data import SchedulerOutput
from quire.kernels.errors import ModelError
from quire.models.checkpoint import save_params
from quire.models.decoder import forward
from quire.models.eagle import embed_for_head, fuse_features, head_forward, head_logits
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from quire.models.params import init_params
from quire.models.registry import load_config
from tests.engine.engines import XLA_KERNELS, FewShapesBackend, InterpretedBackend, check_idle, generate, tiny_folder
from tests.engine.fake_model import DraftsInTurn
from tests.engine.test_laws import PARAMS, PROMPTS, assert_same
from tests.models.heads import PUBLISHED, Head, write_head
from tests.models.helpers import dense_attend, quick_jit

# Few tokens are left to choose from, so that a random head often guesses right: what it guesses is then seen to be its own.
FEW = (3, 5, 8, 13, 21)
BIAS = {5: 0.3, 8: -0.3}
_BIASES = np.array([BIAS.get(token_id, 0.0) for token_id in range(101)], np.float32)
MAX_LEN = 96
pytest.importorskip("torch", reason="heads on disk are made with torch")


@functools.cache
def target_folder(num_layers: int = 3) -> Path:
    """The tiny model with its weights on disk."""
    folder = tiny_folder(num_hidden_layers=num_layers)
    config = load_config(folder)
    save_params(init_params(config, 5, np.float32, stacked=False), config, folder, dtype=np.float32)
    return folder


@functools.cache
def head_folder(draft_vocab_size: int = 60, seed: int = 0) -> Path:
    """A random head for it, whose tokens are a part of the target's."""
    folder = target_folder().parent / f"quire-head-{target_folder().name}-{draft_vocab_size}-{seed}"
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 2, 3], "draft_vocab_size": draft_vocab_size}
    write_head(Head(PUBLISHED | layers), folder, seed)
    return folder


@functools.cache
def engine(
    num_drafts: int, *, adaptive: bool = False, scan_layers: bool = False, mixed_batches: bool = True, **settings: Any
) -> LLM:
    speculation = {"method": "eagle3", "model": str(head_folder()), "adaptive": adaptive}
    backend = FewShapesBackend(scan_layers=scan_layers, mixed_batches=mixed_batches)
    if num_drafts:
        settings["speculative_config"] = {**speculation, "num_speculative_tokens": num_drafts}
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32", "seed": 5, "tokenizer": "demo"}
    return LLM(str(target_folder()), backend=backend, **{**defaults, **settings})


class Oracle:
    """The target and its head over whole sequences, dense, nothing kept between calls."""

    def __init__(self) -> None:
        self.config = load_config(target_folder())
        self.head = load_eagle_config(head_folder(), self.config)
        self.params = init_params(self.config, 5, np.float32, stacked=False)
        self.head_params = load_eagle_params(head_folder(), self.head, np.float32)
        self._features = quick_jit(self._all_features)
        self._hidden = quick_jit(self._all_hidden)

    def _all_features(self, token_ids: jax.Array) -> jax.Array:
        positions = jnp.arange(MAX_LEN, dtype=jnp.int32)
        out = forward(
            self.params,
            self.config,
            token_ids,
            positions,
            None,
            dense_attend(self.config),
            captured_layers=self.head.captured_layers,
        )
        return fuse_features(self.head_params, out.captured)

    def _all_hidden(
        self, token_ids: jax.Array, features: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The entry of position t is the feature of t and the token of t + 1; over `positions` [MAX_LEN], each of them after all before it.

        Results are by position, without meaning where there is none.
        """
        embeddings = embed_for_head(self.head_params, self.head, self.params, jnp.roll(token_ids, -1)[positions])
        attend = dense_attend(self.head.model)
        entering = features[positions]
        hidden, _ = head_forward(self.head_params, self.head, embeddings, entering, positions, None, attend)
        logits = head_logits(self.head_params, self.head, hidden)
        return features.at[positions].set(hidden), jnp.zeros((MAX_LEN, logits.shape[1])).at[positions].set(logits)

    def drafts(self, token_ids: list[int], count: int, missing: Collection[int] = ()) -> list[int]:
        """The likeliest of FEW, `count` times, after all of these tokens, without entries of the positions that are `missing`."""
        tokens, num_known = list(token_ids), len(token_ids)
        # What is missing goes to the end, where nothing before sees it.
        positions = jnp.asarray(sorted(range(MAX_LEN), key=lambda position: (position in missing, position)), jnp.int32)
        features = self._features(_padded(tokens))
        features = features.at[num_known - 1 :].set(0)
        for idx in range(count):
            hidden, logits = self._hidden(_padded(tokens), features, positions)
            last = num_known + idx - 2
            scores = np.asarray(logits[last]) + _BIASES
            tokens.append(FEW[int(np.argmax(scores[list(FEW)]))])
            features = features.at[last + 1].set(hidden[last])
        return tokens[num_known:]


def _padded(token_ids: list[int]) -> jax.Array:
    return jnp.asarray(token_ids + [0] * (MAX_LEN - len(token_ids)), jnp.int32)


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"kernels": XLA_KERNELS, "scan_layers": True}])
def test_drafts_are_those_of_the_head_over_the_whole_sequence(num_drafts: int, settings: dict[str, Any]) -> None:
    """Round for round: how many drafts are accepted says that each was what the head makes of true features."""
    oracle = Oracle()
    llm = engine(num_drafts, max_num_batched_tokens=4 + 32, **settings)
    params = SamplingParams(
        temperature=0.0, max_tokens=40, allowed_token_ids=FEW, logit_bias=BIAS, detokenize=False, ignore_eos=True
    )
    num_accepted = 0
    for prompt in ([7, 8, 9], list(range(3, 50)), [50]):
        (output,) = generate(llm, [prompt], [params])
        emitted = output.outputs[0].token_ids
        per_pos, known = [0] * num_drafts, 1
        num_rounds = 0
        while known < len(emitted):
            count = min(num_drafts, 40 - known - 1)
            drafts = oracle.drafts([*prompt, *emitted[:known]], count)
            accepted = 0
            while accepted < count and drafts[accepted] == emitted[known + accepted]:
                per_pos[accepted] += 1
                accepted += 1
            known += accepted + 1
            num_rounds += count > 0
        assert output.metrics.num_draft_rounds == num_rounds
        assert list(output.metrics.num_accepted_per_pos) == per_pos
        num_accepted += sum(per_pos)
    assert num_accepted > 10, "a head that never guesses right shows nothing"


def _record_steps(llm: LLM) -> list[SchedulerOutput]:
    """The steps that the engine makes from now on."""
    steps: list[SchedulerOutput] = []
    execute = llm.core.runner.execute

    def record(step: SchedulerOutput) -> Any:
        steps.append(step)
        return execute(step)

    llm.core.runner.execute = record  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("counts", [(0, 0, 3, 3, 3), (3, 3, 0, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3)])
@pytest.mark.parametrize("settings", [{"block_size": 4}, {"kernels": XLA_KERNELS, "scan_layers": True}])
def test_after_steps_without_drafts_they_are_those_of_the_head_over_what_it_was_given(
    counts: tuple[int, ...], settings: dict[str, Any]
) -> None:
    """Round for round, and again where blocks are shared that the target filled and the head did not."""
    oracle = Oracle()
    llm = engine(3, adaptive=True, **settings)
    assert llm.core.scheduler.drafts is not None
    llm.core.scheduler.drafts.policy = DraftsInTurn(counts)
    params = SamplingParams(
        temperature=0.0, max_tokens=40, allowed_token_ids=FEW, logit_bias=BIAS, detokenize=False, ignore_eos=True
    )
    prompt, steps = list(range(3, 24)), _record_steps(llm)
    num_accepted = num_woken = num_in_holes = 0
    for _ in range(2):
        steps.clear()
        (output,) = generate(llm, [prompt], [params])
        emitted = output.outputs[0].token_ids
        (admitted,) = (admitted for step in steps for admitted in step.admitted)
        first, num_blocks = admitted.draft_hole
        size = llm.core.config.block_size
        missing = set(range(first * size, (first + num_blocks) * size))
        num_in_holes += len(missing)
        found = [0] * 3
        known = 1
        for step in steps[1:]:
            if known >= len(emitted):
                break
            (row,) = step.decode
            if not step.num_drafts:
                missing.add(len(prompt) + known - 1)
            num_woken += step.wakes_head
            drafts = oracle.drafts([*prompt, *emitted[:known]], min(row.num_drafts, 40 - known - 1), missing)
            agrees = [draft == token for draft, token in zip(drafts, emitted[known:], strict=False)]
            accepted = (agrees + [False]).index(False)
            for position in range(accepted):
                found[position] += 1
            known += accepted + 1
        assert list(output.metrics.num_accepted_per_pos) == found
        num_accepted += sum(found)
        prompt = [*prompt, *emitted[:20]]
    assert num_accepted > 10, "a head that never guesses right shows nothing"
    assert num_woken > 4
    assert num_in_holes > 4


@pytest.fixture(scope="module")
def plain() -> list[RequestOutput]:
    return generate(engine(0), PROMPTS, PARAMS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_drafts": 1, "async_scheduling": False},
        {"decode_steps_per_dispatch": 2},
        {"mixed_batches": False, "scan_layers": True, "kernels": XLA_KERNELS},
        {"max_num_batched_tokens": 4 + 32, "block_size": 5},
        {"adaptive": True},
        {"adaptive": True, "block_size": 5, "decode_steps_per_dispatch": 2},
    ],
)
def test_tokens_and_logprobs_are_those_without_it(settings: dict[str, Any], plain: list[RequestOutput]) -> None:
    """Twice: the second time prefixes are cached. Where the number of drafts is free it goes through all of them."""
    llm = engine(**{"num_drafts": 3, **settings})
    if "adaptive" in settings:
        assert llm.core.scheduler.drafts is not None
        llm.core.scheduler.drafts.policy = DraftsInTurn((0, 3, 3, 0, 0, 1))
    for _ in range(2):
        outputs = generate(llm, PROMPTS, PARAMS)
        assert_same(outputs, plain)
        assert sum(output.metrics.num_draft_rounds for output in outputs) > 50
    assert sum(output.num_cached_tokens for output in outputs) > 100


def test_preempted_and_cached_requests_draft_as_well_as_others() -> None:
    """What a head is given after its blocks were lost, or found, is what it had: the same drafts are accepted."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=59, allowed_token_ids=FEW, detokenize=False, ignore_eos=True)
    ] * 4
    prompts = [PROMPTS[5], PROMPTS[6], PROMPTS[7], PROMPTS[4]]
    calm = engine(1, enable_prefix_caching=False, num_kv_blocks=50)
    alone = [generate(calm, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    tight = engine(1, num_kv_blocks=14)
    for _ in range(2):
        outputs = generate(tight, prompts, params)
        assert_same_tokens(outputs, alone)
    assert tight.stats().num_preemptions > 0
    accepted, drafted = (
        sum(getattr(output.metrics, name) for output in outputs) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    alone_accepted, alone_drafted = (
        sum(getattr(output.metrics, name) for output in alone) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    assert alone_accepted > 20
    # Rounds begin elsewhere after a preemption, so the counts are near each other and not equal.
    assert abs(accepted / drafted - alone_accepted / alone_drafted) < 0.1


def assert_same_tokens(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.slow
def test_the_kernels_of_tpus_give_the_same(plain: list[RequestOutput]) -> None:
    speculation = {"method": "eagle3", "model": str(head_folder()), "num_speculative_tokens": 2, "adaptive": False}
    llm = LLM(
        str(target_folder()),
        backend=InterpretedBackend(scan_layers=True),
        speculative_config=speculation,
        max_num_seqs=4,
        max_model_len=160,
        block_size=16,
        dtype="float32",
        seed=5,
        tokenizer="demo",
    )
    outputs = llm.generate(PROMPTS[:3], PARAMS[:3], use_tqdm=False)
    check_idle(llm)
    assert_same_tokens(outputs, plain[:3])


def test_a_head_for_another_target_is_refused() -> None:
    other = tiny_folder(num_hidden_layers=3, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8)
    speculation = {"method": "eagle3", "model": str(head_folder()), "num_speculative_tokens": 2}
    with pytest.raises(ModelError, match="48"):
        LLM(str(other), load_format="dummy", speculative_config=speculation, backend=FewShapesBackend())
