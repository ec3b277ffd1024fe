"""The Pallas kernels, compiled by the real TPU compiler for chips that are not here: it takes them, and never copies the cache.

What they compute is test_paged_attention_tpu.py's matter. Each chip is compiled for in a process of its own, by
`quire.bench.kernel_programs`; libtpu brings the compiler and is installed with the tests on Linux.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from quire.bench.kernel_programs import KernelShape, job

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; pip install 'quire[tpu]' on Linux x86-64",
)

# As small as what the compiler does with them allows: it takes time by what a row is, not by how many there are.
DECODE = KernelShape("decode", rows=8, context=1024)
VERIFY = replace(DECODE, name="verify", width=5)
PREFILL = KernelShape("prefill", rows=2, width=128, num_heads=8, num_kv_heads=2, context=1024)
SHAPES = [
    DECODE,
    VERIFY,
    PREFILL,
    replace(DECODE, name="float32", dtype="float32"),
    replace(DECODE, name="head_dim_64", head_dim=64, num_heads=9, num_kv_heads=3),
    replace(VERIFY, name="head_dim_80", head_dim=80, num_heads=4, num_kv_heads=4, block_size=16),
    replace(PREFILL, name="head_dim_96", head_dim=96, num_heads=6),
    replace(VERIFY, name="head_dim_256", head_dim=256, num_heads=8, num_kv_heads=1, block_size=128),
    replace(DECODE, name="blocks_of_16", block_size=16),
    replace(DECODE, name="blocks_of_48", block_size=48, num_heads=8, num_kv_heads=2),
    replace(DECODE, name="window", sliding_window=300, soft_cap=50.0),
    replace(VERIFY, name="many_kv_heads", num_heads=32, num_kv_heads=32),
    replace(
        DECODE, name="tables_beyond_scalar_memory", rows=64, context=131072, num_kv_heads=1, num_heads=8, block_size=16
    ),
]
NUM_LAYERS = 3
PROGRAMS = [
    *((program, shape) for shape in SHAPES for program in ("paged_attention", "write_kv")),
    *(("layers", replace(shape, num_layers=NUM_LAYERS)) for shape in (DECODE, PREFILL, SHAPES[4])),
]
CHIPS = ["v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v6e", "v4", "v5p", "tpu7x"))]


@functools.cache
def answers(chip: str) -> list[dict[str, Any]]:
    """What the compiler says of each of `PROGRAMS`."""
    jobs = "\n".join(job(chip, program, shape) for program, shape in PROGRAMS)
    done = subprocess.run(
        [sys.executable, "-m", "quire.bench.kernel_programs"], input=jobs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_compiler_takes_every_shape(chip: str) -> None:
    refused = {
        f"{program} {shape.name}": answer["error"]
        for (program, shape), answer in zip(PROGRAMS, answers(chip), strict=True)
        if "error" in answer
    }
    assert not refused


@pytest.mark.parametrize("chip", CHIPS)
def test_the_cache_is_updated_in_place_and_never_copied(chip: str) -> None:
    for (program, shape), answer in zip(PROGRAMS, answers(chip), strict=True):
        assert answer["cache_copies"] == [], f"{program} {shape.name}"
        if program != "paged_attention":
            assert answer["alias_bytes"] >= answer["cache_bytes"], f"{program} {shape.name}"
        # A copy under another name would be a temporary as large as a layer's blocks at least.
        assert answer["temp_bytes"] < answer["cache_bytes"] / shape.num_layers, f"{program} {shape.name}"
