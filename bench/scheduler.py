"""What scheduling costs the host: microseconds per `schedule` and per `update_from_output`, with no device.

`quire bench scheduler` prints one JSON line. Every request decodes, as in the steady state of a full batch; the
fake result has a token for each row. Times are of the thread's processor time, so that whatever else runs on the machine
does not count; "p10" and "p90" are the tenth and ninetieth percentile over the steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from quire.engine.admission import ContinuousBatching
from quire.engine.kv_cache_manager import KVCacheManager
from quire.engine.request import EngineCoreRequest
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler
from quire.engine.step_data import ModelRunnerOutput, SchedulerOutput, StepLimits

BLOCK_SIZE = 16
TILE_SIZE = 64
PROMPT_LEN = 48


def decoding_scheduler(num_running: int, max_steps: int, *, num_waiting: int = 0) -> Scheduler:
    """A scheduler whose `num_running` requests have their prompts computed and may decode for `max_steps` steps.

    `num_waiting` more requests wait for a slot.
    """
    max_model_len = PROMPT_LEN + max_steps + 2
    scheduler = Scheduler(
        KVCacheManager(1 + (num_running + 1) * -(-max_model_len // BLOCK_SIZE), BLOCK_SIZE, enable_prefix_caching=True),
        StepLimits(num_running, num_running, TILE_SIZE, mixed_batches=True),
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * (1 + TILE_SIZE),
        max_model_len=max_model_len,
        admission=ContinuousBatching(),
    )
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    for idx in range(num_running + num_waiting):
        prompt = (idx, *range(1, PROMPT_LEN))
        scheduler.add_request(EngineCoreRequest(str(idx), prompt, params, arrival_time=float(idx)))
    one_step(scheduler)  # every prompt fits into one
    return scheduler


def one_step(scheduler: Scheduler) -> tuple[float, float]:
    """One step with a made-up result; microseconds of `schedule` and of `update_from_output`."""
    begin = time.thread_time()
    step = scheduler.schedule()
    scheduled = time.thread_time()
    assert step is not None
    result = _result(step)
    ready = time.thread_time()
    scheduler.update_from_output(step, result)
    return (scheduled - begin) * 1e6, (time.thread_time() - ready) * 1e6


def _result(step: SchedulerOutput) -> ModelRunnerOutput:
    num_rows = len(step.decode) + sum(chunk.samples for chunk in step.prefill)
    return ModelRunnerOutput([[7] for _ in range(num_rows)], [None] * num_rows, {})


def measure(num_running: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Median and spread, in microseconds, over `num_steps` steps of `num_running` decoding requests."""
    scheduler = decoding_scheduler(num_running, 2 * num_steps)
    for _ in range(num_steps // 4):
        one_step(scheduler)
    seconds = [one_step(scheduler) for _ in range(num_steps)]
    schedule, update = zip(*seconds, strict=True)
    both = [sum(pair) for pair in seconds]
    return {"schedule_us": _spread(schedule), "update_us": _spread(update), "both_us": _spread(both)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    tenths = quantiles(values, n=10)
    return {"median": round(median(values), 1), "p10": round(tenths[0], 1), "p90": round(tenths[-1], 1)}


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("scheduler", help="what a step costs on the host, without a device")
    parser.add_argument("--num-running", type=int, nargs="+", default=[32, 256, 1000], help="decoding requests")
    parser.add_argument("--num-steps", type=int, default=200, help="steps measured for each (at least 2)")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Measures and prints the line."""
    results = {str(count): measure(count, namespace.num_steps) for count in namespace.num_running}
    print(json.dumps({"benchmark": "scheduler", "num_steps": namespace.num_steps, "num_running": results}))
    return 0
