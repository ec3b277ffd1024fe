"""Engines that speculate, for tests: tiny checkpoints on disk, drafts of every quality, one engine per setting for a while."""

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quire.backends.base import ShapeLimits, StepShape
from quire.engine import LLM, RequestOutput, SamplingParams
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import save_params
from quire.models.params import init_params
from quire.models.registry import load_config
from tests.engine.engines import TINY_CONFIG, FewShapesBackend, InterpretedBackend, token_ids

SEED = 5


class QuickCompiler:
    """Compiles without optimizing, in a third of the time: that is what these tests spend theirs on."""

    def compile(self, lowered: Any) -> Any:
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


class QuickBackend(QuickCompiler, FewShapesBackend):
    """The CPU with few programs, made quickly, whose sampler is no more than the engine was asked for."""

    def step_shapes(self, limits: ShapeLimits) -> list[StepShape]:
        most = limits.most_sampling
        shapes = [replace(s, sampling=min(s.sampling, most)) for s in super().step_shapes(limits)]
        return [replace(s, prompt_logprobs=s.prompt_logprobs and most == SamplingMode.FULL) for s in shapes]


class QuickInterpretedBackend(QuickCompiler, InterpretedBackend):
    """The same with the TPU's kernels."""


GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "sliding_window": 20,
    "query_pre_attn_scalar": 10,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windowed": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "windowed_and_full": GEMMA,
}
DRAFTS = ("good", "bad", "itself", "other family", "ngram")
"""The target's weights with some noise on them, other random weights, the target's own, another architecture; and no model at all."""


@functools.cache
def checkpoint(family: str = "llama", *, seed: int = SEED, noise: float = 0.0) -> Path:
    """A folder with random float32 weights; `noise` is what is added to them, relative to each tensor's spread."""
    folder = Path(tempfile.mkdtemp(prefix="quire-draft-"))
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, **TARGETS[family]}))
    config = load_config(folder)
    params = init_params(config, seed, np.float32, stacked=False)
    if noise:
        rng = np.random.default_rng(17)
        params = jax.tree.map(
            lambda leaf: np.asarray(leaf + noise * np.std(leaf) * rng.normal(size=leaf.shape), np.float32), params
        )
    save_params(params, config, folder, dtype=np.float32)
    return folder


def draft_config(draft: str, num_drafts: int, target: str = "llama", **changes: Any) -> str:
    """What `speculative_config` says for one of DRAFTS: always so many drafts, unless `changes` say otherwise."""
    common = {"num_speculative_tokens": num_drafts, "adaptive": False, **changes}
    if draft == "ngram":
        return json.dumps({"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3, **common})
    folders = {
        "good": lambda: checkpoint(target, noise=0.1),
        "bad": lambda: checkpoint(target, seed=77),
        "itself": lambda: checkpoint(target),
        "other family": lambda: checkpoint("windowed_and_full" if target == "llama" else "llama"),
    }
    return json.dumps({"method": "draft_model", "model": str(folders[draft]()), **common})


def model_config(folder: Path, num_drafts: int, **changes: Any) -> str:
    """The same for a draft model of one's own."""
    common = {"num_speculative_tokens": num_drafts, "adaptive": False, **changes}
    return json.dumps({"method": "draft_model", "model": str(folder), **common})


# The programs of one take hundreds of memory maps, of which Linux lets a process have 65,530.
@functools.lru_cache(maxsize=24)
def engine(
    draft: str | None = None,
    num_drafts: int = 3,
    *,
    target: str = "llama",
    adaptive: bool = False,
    scan_layers: bool = False,
    mixed_batches: bool = True,
    tile_size: int = 32,
    interpreted: bool = False,
    **settings: Any,
) -> LLM:
    """An engine on a tiny model whose weights are on disk, drafting as said; the same object for the settings that were asked for last."""
    kind = QuickInterpretedBackend if interpreted else QuickBackend
    backend = kind(scan_layers=scan_layers, mixed_batches=mixed_batches, tile_size=tile_size)
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32"}
    speculative = None if draft is None else draft_config(draft, num_drafts, target, adaptive=adaptive)
    return LLM(
        str(checkpoint(target)),
        backend=backend,
        tokenizer="demo",
        speculative_config=speculative,
        **{**defaults, **settings},
    )


def greedy(max_tokens: int | None, **changes: Any) -> SamplingParams:
    """So many of the likeliest tokens."""
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "detokenize": False, "ignore_eos": True, **changes}
    )


def without_drafts(params: Sequence[SamplingParams]) -> list[SamplingParams]:
    """The same requests with nothing said of speculation."""
    return [replace(each, num_speculative_tokens=None) for each in params]


def assert_same(found: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    """Equal tokens, texts and ends; the same tokens in the logprobs, whose values agree to 1e-4: sums in programs of other widths round
    differently."""
    assert token_ids(found) == token_ids(expected)
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            assert (mine.text, mine.finish_reason, mine.stop_reason) == (
                theirs.text,
                theirs.finish_reason,
                theirs.stop_reason,
            )
            _assert_same_logprobs(mine.logprobs, theirs.logprobs)
        _assert_same_logprobs(one.prompt_logprobs, other.prompt_logprobs)


def _assert_same_logprobs(found: Sequence[Any] | None, expected: Sequence[Any] | None) -> None:
    assert (found is None) == (expected is None)
    for mine, theirs in zip(found or (), expected or (), strict=True):
        assert (mine is None) == (theirs is None), "the first token of a prompt has none"
        if mine is not None:
            assert mine.keys() == theirs.keys()
            assert [entry.rank for entry in mine.values()] == [entry.rank for entry in theirs.values()]
            values = [[entry[token].logprob for token in mine] for entry in (mine, theirs)]
            np.testing.assert_allclose(*values, atol=1e-4)
