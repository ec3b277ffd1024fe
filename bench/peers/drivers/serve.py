"""Serves one engine over standard input and output: a JSON object a line in, one a line out. Imports the standard library alone.

    python serve.py DRIVER.py
    {"op": "load", "model": ..., "threads": 2, ...}                    -> {"version": ..., "runs": ...}
    {"op": "generate", "prompts": [[3, ...], ...], "output_lens": [8, ...]} -> {"token_ids": [[...], ...], "token_times": [[...], ...]}

Whatever goes wrong is answered with {"error": ...}. The end of standard input ends the process at once, whatever it is doing: who asked
is gone, or has seen enough. A driver is a file with

    load(settings) -> engine       ready to generate when it returns
    engine.about                   {"version": ..., "runs": what of its ways of running it uses}
    engine.generate(prompts, output_lens, record)
                                   greedy, exactly `output_lens[i]` tokens each; calls record.start() when the requests are handed
                                   over and record(i, token_ids) when tokens of the i-th have come

All threads that an engine starts stay on `threads` of the processors, which is set before the driver is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
import time
import traceback
from typing import Any


class Recorder:
    """When which token came: seconds from `start`, one entry per token."""

    def __init__(self, num_requests: int) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(num_requests)]
        self.token_times: list[list[float]] = [[] for _ in range(num_requests)]
        self._begin = time.perf_counter()

    def start(self) -> None:
        """Sets the clock to zero."""
        self._begin = time.perf_counter()

    def __call__(self, idx: int, token_ids: list[int]) -> None:
        """Notes that tokens of request `idx` have come, now."""
        seconds = round(time.perf_counter() - self._begin, 6)
        self.token_ids[idx].extend(token_ids)
        self.token_times[idx].extend([seconds] * len(token_ids))


def answer(driver: Any, engines: list[Any], message: dict[str, Any]) -> dict[str, Any]:
    """The reply to one message; `engines` holds the engine once it is loaded."""
    if message["op"] == "load":
        engines.append(driver.load(message))
        return dict(engines[0].about)
    if message["op"] == "generate":
        record = Recorder(len(message["prompts"]))
        engines[0].generate(message["prompts"], message["output_lens"], record)
        return {"token_ids": record.token_ids, "token_times": record.token_times}
    raise ValueError(f"unknown op {message['op']!r}")


def load_driver(path: str) -> Any:
    """The driver's module, by its path: its folder stays off sys.path, where its files could hide packages."""
    spec = importlib.util.spec_from_file_location("driver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep_to_processors(count: int) -> None:
    """Leaves this process, and what it starts, the first `count` of the processors that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def read_until_the_end(lines: queue.SimpleQueue[str]) -> None:
    """Hands on standard input; ends the process when that ends, without taking anything down, which engines may hang in."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> None:
    """Answers until standard input ends."""
    # Libraries print to standard output as they like; that goes to standard error, and the replies to where they used to.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        sys.path[:] = [entry for entry in sys.path if entry not in ("", os.path.dirname(os.path.abspath(__file__)))]
        driver: Any = None
        engines: list[Any] = []
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=read_until_the_end, args=(lines,), daemon=True).start()
        while True:
            message = json.loads(lines.get())
            try:
                if driver is None:
                    keep_to_processors(message["threads"])
                    driver = load_driver(sys.argv[1])
                reply = answer(driver, engines, message)
            except Exception as error:
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
