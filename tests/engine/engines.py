"""Engines for tests: tiny models with random weights, few programs, and one engine per setting for the whole session."""

import functools
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from quire.backends.base import ShapeLimits, StepShape
from quire.backends.cpu import CpuBackend
from quire.backends.shapes import with_drafts
from quire.engine import LLM, RequestOutput, SamplingParams
from quire.engine.request import EngineCoreRequest
from quire.kernels.op import Choice
from quire.kernels.ops import PALLAS_TPU, Ops
from quire.kernels.paged_attention import tpu
from quire.kernels.sampling.rows import SamplingMode

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


XLA_KERNELS = "linear=reference,write_kv=reference,paged_attention=reference,sample=reference"
"""The kernels of a CPU without the C++ library, and of every device without kernels of its own."""


class FewShapesBackend(CpuBackend):
    """The CPU with two programs, which cover everything: the widest decode step, and the widest step with a prompt in it."""

    def __init__(self, *, scan_layers: bool = False, mixed_batches: bool = True, tile_size: int = 32) -> None:
        super().__init__()
        self.capabilities = replace(
            self.capabilities, scan_layers=scan_layers, mixed_batches=mixed_batches, tile_size=tile_size
        )

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        blocks = -(-limits.max_model_len // limits.block_size)
        rows, tiles, tile_size = limits.max_num_seqs, limits.max_prefill_tiles, self.capabilities.tile_size
        mixed_rows = rows if self.capabilities.mixed_batches else 0
        steps = sorted({1, limits.decode_steps_per_dispatch})
        shapes = [
            *(StepShape(rows, 0, tile_size, blocks, count, SamplingMode.FULL) for count in steps),
            StepShape(mixed_rows, tiles, tile_size, blocks, 1, SamplingMode.FULL, prompt_logprobs=True),
        ]
        return with_drafts(shapes, limits)


class InterpretedBackend(FewShapesBackend):
    """The CPU with the kernels, the cache's format and the scanned layers of a TPU."""

    def select_ops(self, *arguments, **named) -> Ops:
        ops = super().select_ops(*arguments, **named)
        functions = {
            "kv_cache": tpu.HeadMajor(),
            "write_kv": partial(tpu.write_kv, interpret=True),
            "paged_attention": partial(tpu.paged_attention, interpret=True),
        }
        choices = {name: Choice(name, PALLAS_TPU, function, ()) for name, function in functions.items()}
        return replace(ops, **choices)


@functools.cache
def tiny_folder(**changes: object) -> Path:
    """A folder with a config.json, for `load_format="dummy"`."""
    folder = Path(tempfile.mkdtemp(prefix="quire-tiny-"))
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, **changes}))
    return folder


@functools.cache
def tiny_engine(
    *, scan_layers: bool = False, mixed_batches: bool = True, tile_size: int = 32, **settings: object
) -> LLM:
    """An engine on the tiny model; the same object for the same settings."""
    backend = FewShapesBackend(scan_layers=scan_layers, mixed_batches=mixed_batches, tile_size=tile_size)
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32", "seed": 5}
    return LLM(str(tiny_folder()), backend=backend, load_format="dummy", **{**defaults, **settings})


def generate(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
    """Runs to the end and checks that the engine is empty, whole, and compiled nothing."""
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    check_idle(llm)
    return outputs


_IDS = itertools.count()


def serve_schedule(
    llm: LLM,
    kinds: Sequence[tuple[Sequence[int], SamplingParams]],
    arrivals: Sequence[tuple[int, int]],
    aborts: Mapping[int, int],
) -> dict[int, list[int]]:
    """Tokens by arrival; `arrivals` are (step, index of a kind), `aborts` map an arrival to the step at which it is ended."""
    core = llm.core
    names = [f"scheduled-{next(_IDS)}" for _ in arrivals]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    step = 0
    while step <= max(when for when, _ in arrivals) or core.has_work:
        for name, (when, kind) in zip(names, arrivals, strict=True):
            if when == step:
                prompt, params = kinds[kind]
                core.add_request(EngineCoreRequest(name, tuple(prompt), params, time.monotonic()))
        for arrival, when in aborts.items():
            if when == step:
                core.abort_request(names[arrival])
        for output in core.step():
            tokens[output.request_id].extend(output.new_token_ids)
        core.scheduler.check()
        step += 1
        assert step < 2000, "the engine does not come to an end"
    return dict(enumerate(tokens.values()))


def check_idle(llm: LLM) -> None:
    """Every block is free, every slot is free, nothing was compiled after warm-up."""
    llm.core.scheduler.check()
    stats = llm.stats()
    assert llm.core.scheduler.kv_cache.pool.num_used == 0
    assert stats.num_requests_running == stats.num_requests_waiting == 0
    assert stats.num_recompilations == 0


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    """Per request, per choice."""
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@functools.cache
def windowed_engine(**settings: object) -> LLM:
    """A tiny model whose every layer sees the last 20 tokens."""
    folder = tiny_folder(architectures=("MistralForCausalLM",), model_type="mistral", sliding_window=20)
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32", "seed": 5, "block_size": 8}
    return LLM(str(folder), backend=FewShapesBackend(), load_format="dummy", **{**defaults, **settings})


@functools.cache
def demo_engine() -> LLM:
    """The bundled model, in float32, with its tokenizer."""
    return LLM("demo", backend=FewShapesBackend(), max_num_seqs=4, max_model_len=256, dtype="float32")
