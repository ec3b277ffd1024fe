"""`quire env`: versions, devices, and what is available here and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import jax

from quire.backends.environment import available_memory, available_processors, cache_folder, cpu_flags
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
    "libneuronxla",
    "neuronx-cc",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
)
NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("env", help="versions, devices, what is available and why not")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Prints the report."""
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
        "backends": {name: unavailable_reason(name) or "available" for name in DEVICES},
        "CPU kernels": _cpu_kernels(),
        "kernels": {op.name: ", ".join(implementation.name for implementation in op.implementations) for op in OPS},
        "architectures": list(SUPPORTED_ARCHITECTURES),
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
