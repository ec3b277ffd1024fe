"""`quire bench offline`: the engine core on a queue of requests, token ids in and out, without text or a server around it.

Prints one JSON line: throughput, step times, padding, KV waste, preemptions, and the host's share of a step. `--compare-batching`
runs the same requests under each batching policy, interleaved, so that their ratio is measured in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from quire.engine import LLM, SamplingParams
from quire.engine.admission import BATCHING_POLICIES, make_admission_policy
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.metrics import EngineStats
from quire.engine.request import EngineCoreRequest


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, drawn uniformly from [least, most]."""

    num_requests: int
    min_input_len: int
    max_input_len: int
    min_output_len: int
    max_output_len: int
    temperature: float
    seed: int


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("offline", help="throughput and step times of the engine alone")
    parser.add_argument(
        "--model", "-m", default="demo", help="Hugging Face id, folder, demo or demo-draft (default: demo)"
    )
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument(
        "--input-len", type=length_range, default=(16, 512), help="tokens of a prompt: LEAST-MOST or one number"
    )
    parser.add_argument(
        "--output-len", type=length_range, default=(16, 256), help="tokens of an output: LEAST-MOST or one number"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--workload-seed", type=int, default=0)
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of the whole workload; figures are medians over them"
    )
    parser.add_argument("--compare-batching", action="store_true", help="run every batching policy, interleaved")
    parser.add_argument("--profile", type=Path, help="a folder for a profile of all runs, for the device's viewer")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Runs the workload and prints the line."""
    min_input_len, max_input_len = namespace.input_len
    min_output_len, max_output_len = namespace.output_len
    workload = Workload(
        num_requests=namespace.num_requests,
        min_input_len=min_input_len,
        max_input_len=max_input_len,
        min_output_len=min_output_len,
        max_output_len=max_output_len,
        temperature=namespace.temperature,
        seed=namespace.workload_seed,
    )
    llm = LLM(**engine_arguments(namespace))
    policies = BATCHING_POLICIES if namespace.compare_batching else (llm.config.scheduler.batching,)
    _run_once(llm, workload, policies[0], limit=min(workload.num_requests, 4), title="warm")
    runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    with llm.core.profile(namespace.profile) if namespace.profile else nullcontext():
        for repeat in range(namespace.repeats):
            for policy in policies:
                title = f"{policy} {repeat + 1}/{namespace.repeats}"
                runs[policy].append(_run_once(llm, workload, policy, title=title))
    results = {policy: _medians(found) for policy, found in runs.items()}
    report: dict[str, Any] = {
        "benchmark": "offline",
        "model": llm.config.model.model,
        "dtype": llm.core.config.dtype,
        "device": f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores)",
        "max_num_seqs": llm.core.config.max_num_seqs,
        "max_num_batched_tokens": llm.core.config.max_num_batched_tokens,
        "workload": asdict(workload),
        "repeats": namespace.repeats,
        "ready_seconds": round(llm.core.ready_seconds, 2),
        "compilations": llm.stats().num_compilations,
        "recompilations": llm.stats().num_recompilations,
        **results[policies[0]],
    }
    if namespace.compare_batching:
        report["batching"] = results
        report["throughput_over_static"] = [
            round(mine["output_tokens_per_s"] / static["output_tokens_per_s"], 3)
            for mine, static in zip(runs["continuous"], runs["static"], strict=True)
        ]
    print(json.dumps(report))
    return 0


def make_requests(workload: Workload, vocab_size: int, name: str) -> list[EngineCoreRequest]:
    """The workload's requests, the same for the same seed: random tokens, no two prompts alike."""
    rng = np.random.default_rng(workload.seed)
    requests = []
    for idx in range(workload.num_requests):
        input_len = int(rng.integers(workload.min_input_len, workload.max_input_len + 1))
        output_len = int(rng.integers(workload.min_output_len, workload.max_output_len + 1))
        prompt = tuple(rng.integers(0, vocab_size, input_len).tolist())
        params = SamplingParams(
            max_tokens=output_len, temperature=workload.temperature, seed=idx, ignore_eos=True, detokenize=False
        )
        requests.append(EngineCoreRequest(f"{name}-{idx}", prompt, params, arrival_time=time.monotonic()))
    return requests


def _run_once(llm: LLM, workload: Workload, policy: Any, *, title: str, limit: int | None = None) -> dict[str, float]:
    """Runs all requests to their end under one policy; every figure of the run."""
    core = llm.core
    window_seconds = llm.config.scheduler.batching_window
    core.scheduler.set_admission_policy(
        make_admission_policy(policy, window_seconds=window_seconds, max_num_seqs=core.config.max_num_seqs)
    )
    core.scheduler.kv_cache.forget_prefixes()
    requests = make_requests(workload, core.model.vocab_size, f"{title}-{time.monotonic()}")[:limit]
    before = core.stats()
    step_seconds: list[float] = []
    decode_seconds: list[float] = []
    waste: list[float] = []
    for request in requests:
        core.add_request(request)
    hidden = not sys.stderr.isatty()
    begin = time.perf_counter()
    with tqdm(total=len(requests), desc=title, disable=hidden, dynamic_ncols=True, leave=False) as bar:
        while core.has_work:
            step_begin = time.perf_counter()
            outputs = core.step()
            if not outputs and not core.is_busy:
                time.sleep(0.001)  # windowed batching lets nobody in yet
                continue
            seconds = time.perf_counter() - step_begin
            step_seconds.append(seconds)
            if len(outputs) == core.config.max_num_seqs:
                decode_seconds.append(seconds)
            usage = core.scheduler.kv_cache.usage(core.scheduler.running)
            held = usage.num_used_blocks * core.config.block_size
            if held:
                waste.append(usage.num_wasted_tokens / held)
            bar.update(sum(output.finish_reason is not None for output in outputs))
    elapsed = time.perf_counter() - begin
    return _figures(requests, before, core.stats(), elapsed, step_seconds, decode_seconds, waste)


def _figures(
    requests: list[EngineCoreRequest],
    before: EngineStats,
    after: EngineStats,
    elapsed: float,
    step_seconds: list[float],
    full_batch_seconds: list[float],
    waste: list[float],
) -> dict[str, float]:
    def gained(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    host = gained("schedule_seconds") + gained("launch_seconds") + gained("update_seconds")
    tokens = gained("num_real_tokens") + gained("num_padding_tokens")
    num_steps = gained("num_steps")
    figures = {
        "elapsed_s": elapsed,
        "requests_per_s": len(requests) / elapsed,
        "prompt_tokens_per_s": sum(len(request.prompt_token_ids) for request in requests) / elapsed,
        "output_tokens_per_s": gained("num_generation_tokens") / elapsed,
        "steps": num_steps,
        "step_ms_p50": 1e3 * float(np.percentile(step_seconds, 50)),
        "step_ms_p95": 1e3 * float(np.percentile(step_seconds, 95)),
        "padding_share": gained("num_padding_tokens") / tokens,
        "kv_waste_share": float(np.mean(waste)),
        "preemptions": gained("num_preemptions"),
        "host_share": host / elapsed,
        "schedule_ms": 1e3 * gained("schedule_seconds") / num_steps,
        "launch_ms": 1e3 * gained("launch_seconds") / num_steps,
        "update_ms": 1e3 * gained("update_seconds") / num_steps,
    }
    if full_batch_seconds:
        figures["full_batch_step_ms_p50"] = 1e3 * float(np.percentile(full_batch_seconds, 50))
    return figures


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure, and the relative spread of the throughput over the runs."""
    names = [name for name in runs[0] if all(name in found for found in runs)]
    medians = {name: _rounded(statistics.median(found[name] for found in runs)) for name in names}
    rates = [found["output_tokens_per_s"] for found in runs]
    medians["output_tokens_per_s_spread"] = _rounded((max(rates) - min(rates)) / statistics.median(rates))
    return medians


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def length_range(text: str) -> tuple[int, int]:
    """The type of a length flag: `N`, or `LEAST-MOST`, both counted. Raises argparse.ArgumentTypeError."""
    least, _, most = text.partition("-")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor LEAST-MOST") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: lengths are at least 1, the least first")
    return bounds
