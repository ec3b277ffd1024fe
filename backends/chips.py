"""What is known of each chip, as data: chips.json has a line for each, with its source."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """One device as jax counts them."""

    name: str
    device_kinds: tuple[str, ...]
    """What jax calls it."""
    hbm_gib: float
    """Memory that programs may use, in GiB."""
    hbm_gb_per_s: float
    """Memory bandwidth, in 10^9 bytes per second."""
    bf16_tflops: float
    """Dense bfloat16 products, in 10^12 operations per second."""
    source: str
    clock_ghz: float | None = None
    """Of the vector unit, as the TPU compiler's estimates imply it; None where they were not looked at."""
    platform: str = "tpu"
    """What jax calls the kind of device."""
    generation: str = ""
    """Of NeuronCores: v2, v3 or v4."""
    cores_per_device: int = 1
    """Physical cores that are one device unless the user says otherwise; the numbers above are those of all of them."""
    devices_per_chip: int = 1

    @property
    def hbm_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.hbm_gib * 2**30)


@functools.cache
def all_chips() -> dict[str, Chip]:
    """Every chip by its name."""
    entries = json.loads((Path(__file__).parent / "chips.json").read_text(encoding="utf-8"))
    return {
        name: Chip(name=name, **{**entry, "device_kinds": tuple(entry["device_kinds"])})
        for name, entry in entries.items()
    }


def chips(platform: str = "tpu") -> dict[str, Chip]:
    """The chips of one platform by their names."""
    return {name: chip for name, chip in all_chips().items() if chip.platform == platform}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None for one that is not in the list."""
    return next((chip for chip in all_chips().values() if device_kind in chip.device_kinds), None)
