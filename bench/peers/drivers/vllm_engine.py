"""vLLM's engine in this process, stepped here; compiled for the CPU as its defaults have it."""

from __future__ import annotations

from typing import Any

import vllm  # type: ignore[import-not-found]


class Engine:
    """`LLM` and the engine below it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llm = vllm.LLM(
            settings["model"],
            dtype="bfloat16",
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            kv_cache_memory_bytes=settings["num_kv_tokens"] * settings["kv_bytes_per_token"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine = llm.llm_engine
        self._num_calls = 0
        self.about = {
            "version": f"vllm {vllm.__version__}",
            "runs": "engine in its process, bfloat16, its default compilation",
        }

    def generate(self, prompts: list[list[int]], output_lens: list[int], record: Any) -> None:
        """All requests at once."""
        engine = self._engine
        self._num_calls += 1
        record.start()
        for idx, (prompt, output_len) in enumerate(zip(prompts, output_lens, strict=True)):
            params = vllm.SamplingParams(
                temperature=0.0,
                max_tokens=output_len,
                ignore_eos=True,
                detokenize=False,
                output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
            )
            engine.add_request(f"{self._num_calls}-{idx}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                record(int(output.request_id.split("-")[1]), list(output.outputs[0].token_ids))


def load(settings: dict[str, Any]) -> Engine:
    """Loads and compiles the model."""
    return Engine(settings)
