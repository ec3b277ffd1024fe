"""Run in a process of its own: an engine on devices that jax is told are a platform named neuron, and are the CPU's.

The backend then takes every turn that it takes with AWS's plugin: it settles the environment, asks jax for the platform, lowers for it,
compiles through it, and reads how much memory is left. Prints the tokens, and what was settled, as JSON.
"""

import json
import os
import sys
from types import ModuleType

import jax
from jax._src import xla_bridge
from jaxlib import xla_client

from quire.backends.neuron import NeuronBackend, NeuronOptions
from quire.engine import LLM, SamplingParams

PROMPTS = [[3 + (7 * idx) % 90 for idx in range(length)] for length in (1, 17, 130, 64, 40, 5)]
PARAMS = [
    SamplingParams(temperature=temperature, seed=3, max_tokens=12, ignore_eos=True, detokenize=False)
    for temperature in (0.0, 0.9, 0.0, 0.9, 0.0, 0.9)
]
SETTINGS = {
    "load_format": "dummy",
    "dtype": "float32",
    "max_model_len": 200,
    "max_num_seqs": 4,
    "seed": 5,
    "sampling": "random",
}


def main(folder: str, num_devices: int) -> None:
    sys.modules["libneuronxla"] = ModuleType("libneuronxla")
    xla_bridge.register_backend_factory("neuron", xla_client.make_cpu_client, priority=500, fail_quietly=False)
    backend = NeuronBackend.attached(NeuronOptions(), num_devices)
    llm = LLM(folder, **SETTINGS, tensor_parallel_size=num_devices, backend=backend)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    said = {
        "tokens": [[choice.token_ids for choice in output.outputs] for output in outputs],
        "platform": backend.capabilities.platform,
        "chip": backend.chip.name,
        "generator": jax.config.values["jax_default_prng_impl"],
        "flags": os.environ["NEURON_CC_FLAGS"],
        "cores": os.environ["NEURON_RT_NUM_CORES"],
        "recompilations": llm.stats().num_recompilations,
        "held": backend.chip.hbm_bytes - backend.kv_cache_bytes(1.0, 0),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
