"""OpenVINO GenAI's ContinuousBatchingPipeline, its requests added at once and its steps taken here."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

BLOCK_SIZE = 32  # tokens in a block of its cache on the CPU
BATCH_TOKENS = 2048


class Engine:
    """The pipeline in bfloat16, with its default of an 8-bit cache."""

    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = BATCH_TOKENS
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.num_kv_blocks = settings["num_kv_tokens"] // BLOCK_SIZE
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": settings["threads"]}
        self._pipeline = genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties)
        self._num_requests = 0
        self.about = {
            "version": f"openvino-genai {genai.__version__.split('-')[0]}",
            "runs": "ContinuousBatchingPipeline, 16-bit weights computed in bfloat16, its default 8-bit cache",
        }

    def generate(self, prompts: list[list[int]], output_lens: list[int], record: Any) -> None:
        """All requests at once."""
        record.start()
        handles = []
        for prompt, output_len in zip(prompts, output_lens, strict=True):
            self._num_requests += 1
            tokens = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._num_requests, tokens, _greedy(output_len)))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for idx, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        record(idx, list(output.generated_ids))


def _greedy(output_len: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = output_len
    config.ignore_eos = True
    config.do_sample = False
    return config


def load(settings: dict[str, Any]) -> Engine:
    """Loads the exported model."""
    return Engine(settings)
