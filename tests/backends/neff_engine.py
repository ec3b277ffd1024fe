"""Run in a process of its own: an engine through torch-neuronx, which is stood in for. Prints the tokens, and what was settled, as JSON."""

import json
import sys

from quire.backends.neuron import NeuronBackend, NeuronOptions
from quire.engine import LLM
from tests.backends import torch_neuronx_stand_in
from tests.backends.neuron_plugin import PARAMS, PROMPTS, SETTINGS


def main(folder: str, num_devices: int, settings: str) -> None:
    torch_neuronx_stand_in.install()
    backend = NeuronBackend.attached(NeuronOptions(), num_devices)
    arguments = {**SETTINGS, **json.loads(settings)}
    llm = LLM(folder, **arguments, tensor_parallel_size=num_devices, backend=backend)
    rounds = [llm.generate(PROMPTS, PARAMS, use_tqdm=False) for _ in range(2)]  # the second finds prefixes cached
    stats = llm.stats()
    said = {
        "tokens": [[[choice.token_ids for choice in output.outputs] for output in outputs] for outputs in rounds],
        "runs": torch_neuronx_stand_in.calls["run"],
        "programs": len(llm.core.runner.programs) + 1,
        "held": backend.chip.hbm_bytes - backend.kv_cache_bytes(1.0, 0),
        "prefix_hits": stats.num_prefix_hits,
        "blocks": llm.core.scheduler.kv_cache.pool.num_used,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
