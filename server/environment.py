"""`quire env`: versions, devices, and what is available here and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from quire.backends.environment import available_memory, available_processors, cache_folder, cpu_flags, neuron_facts
from quire.backends.select import DEVICES, unavailable_reason
from quire.kernels.native import library
from quire.kernels.op import OpContext
from quire.kernels.ops import OPS
from quire.models.registry import SUPPORTED_ARCHITECTURES

PACKAGES = (
    "quire",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-neuronx",
    "libneuronxla",
    "neuronx-cc",
    "nki",
    "torch",
    "torch-neuronx",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
)
# A greedy continuation by the bundled model with few programs: the same text everywhere in float32.
_TRIAL = [
    "--prompt",
    "def add(a, b):",
    "--max-tokens",
    "16",
    "--sampling",
    "greedy",
    "--dtype",
    "float32",
    "--max-model-len",
    "256",
]
_TRIAL_SECONDS = 3600
_LOG_CHARACTERS = 20_000
NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("env", help="versions, devices, what is available and why not")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="generate a few tokens on each device that is here as well, and write all of it to a file to send with a question",
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Prints what is here; with --report, also tries it, and writes everything down."""
    if namespace.report is not None:
        return write_report(namespace.report)
    report = collect()
    if namespace.json:
        print(json.dumps(report))
        return 0
    for title, content in report.items():
        print(f"{title}:")
        rows = content.items() if isinstance(content, dict) else ((item, "") for item in content)
        for name, value in rows:
            print(f"  {name:<18} {value}".rstrip())
    return 0


def collect() -> dict[str, Any]:
    """Everything that helps to tell why something does or does not run here."""
    flags = cpu_flags()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "host": {
            "system": platform.platform(),
            "processor flags": " ".join(flag for flag in NOTABLE_FLAGS if flag in flags) or "none of note",
            "usable processors": str(available_processors()),
            "free memory": f"{available_memory() / 2**30:.1f} GiB",
            "program cache": str(cache_folder()),
        },
        "jax devices": _jax_devices(),
        "Neuron": neuron_facts(),
        "backends": {name: unavailable_reason(name) or "available" for name in DEVICES},
        "CPU kernels": _cpu_kernels(),
        "kernels": {op.name: ", ".join(implementation.name for implementation in op.implementations) for op in OPS},
        "architectures": list(SUPPORTED_ARCHITECTURES),
    }


def write_report(path: Path) -> int:
    """Writes what is here and how a few tokens went on each device to a JSON file; 1 where one of them failed.

    Each device is tried in a process of its own, so that one whose libraries bring the process down is in the report too. Nothing of
    the user's is in it but the settings whose names begin with NEURON, and the host's name is not.
    """
    trials = {}
    for device in (name for name in DEVICES if name != "auto" and unavailable_reason(name) is None):
        print(f"generating a few tokens on {device}", file=sys.stderr, flush=True)
        trials[device] = _try_device(device)
        print(f"  {trials[device]['outcome']}", file=sys.stderr, flush=True)
    # Looked at last: this process would hold the devices that it asks jax for, and the trials could not have them.
    path.write_text(json.dumps({**collect(), "trials": trials}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}; look through it before you send it", file=sys.stderr)
    return 0 if all(trial["outcome"] == "ok" for trial in trials.values()) else 1


def _try_device(device: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "quire.server.cli", "--verbose", "generate", "demo", "--device", device]
    begin = time.perf_counter()
    try:
        done = subprocess.run([*command, *_TRIAL], capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        return {"outcome": f"not done after {_TRIAL_SECONDS} s", "log": said[-_LOG_CHARACTERS:]}
    return {
        "outcome": "ok" if done.returncode == 0 else f"exit status {done.returncode}",
        "seconds": round(time.perf_counter() - begin, 1),
        "text": done.stdout,
        "log": done.stderr[-_LOG_CHARACTERS:],
    }


def _cpu_kernels() -> dict[str, str]:
    """For each instruction set whether its kernels can run here, and why not; the first that can is taken."""
    context = OpContext(
        "cpu", "cpu", "float32", num_heads=1, num_kv_heads=1, head_dim=64, block_size=16, instruction_sets=cpu_flags()
    )
    return {name: library.refuses_any_model(name, context) or "available" for name in library.INSTRUCTION_SETS}


def _jax_devices() -> dict[str, str]:
    try:
        return {str(device): device.device_kind for device in jax.devices()}
    except RuntimeError as error:  # such as JAX_PLATFORMS naming a platform that is not here
        return {"none": str(error)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
