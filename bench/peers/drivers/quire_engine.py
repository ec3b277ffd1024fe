"""quire's engine core, as `quire bench offline` drives it."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

from quire.backends.select import select_backend
from quire.engine import LLM, SamplingParams
from quire.engine.request import EngineCoreRequest


class Engine:
    """The engine core, with no text and no server around it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        given = settings["arguments"]
        block_size = given.get("block_size") or select_backend(given.get("device", "auto")).capabilities.block_size
        arguments = {
            "dtype": "bfloat16",
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": settings["max_num_seqs"],
            "num_kv_blocks": settings["num_kv_tokens"] // block_size + 1,  # one is the null block
            "enable_prefix_caching": False,
        }
        self._core = LLM(settings["model"], **{**arguments, **given}).core
        self._num_calls = 0
        runs = " ".join(f"{name}={value}" for name, value in given.items())
        self.about = {
            "version": importlib.metadata.version("quire"),
            "runs": f"engine core in its process, {self._core.config.dtype} {runs}".strip(),
        }

    def generate(self, prompts: list[list[int]], output_lens: list[int], record: Any) -> None:
        """All requests at once."""
        core = self._core
        self._num_calls += 1
        record.start()
        for idx, (prompt, output_len) in enumerate(zip(prompts, output_lens, strict=True)):
            params = SamplingParams(max_tokens=output_len, temperature=0.0, seed=0, ignore_eos=True, detokenize=False)
            name = f"{self._num_calls}-{idx}"
            core.add_request(EngineCoreRequest(name, tuple(prompt), params, arrival_time=time.monotonic()))
        while core.has_work:
            for output in core.step():
                record(int(output.request_id.split("-")[1]), output.new_token_ids)


def load(settings: dict[str, Any]) -> Engine:
    """Loads the model and compiles every shape."""
    return Engine(settings)
