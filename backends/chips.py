"""What is known of each chip, as data: chips.json has a line for each, with its source."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.kernels.errors import InvalidConfigError


@dataclass(frozen=True)
class Instance:
    """A machine to rent."""

    name: str
    num_devices: int
    usd_per_hour: float


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
    link_gb_per_s: float | None = None
    """To the other chips, out of a device, all of its links together, in 10^9 bytes per second; None where it is not documented."""
    usd_per_hour: float | None = None
    """Of one device, where they are rented one by one."""
    instances: tuple[Instance, ...] = ()
    """The machines that they are rented in, where that is how."""

    def price(self, num_devices: int) -> float | None:
        """US dollars an hour for at least so many devices, in the cheapest machines of one kind; None where no price is public."""
        if not self.instances:
            return None if self.usd_per_hour is None else num_devices * self.usd_per_hour
        return min(-(-num_devices // one.num_devices) * one.usd_per_hour for one in self.instances)

    @property
    def hbm_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.hbm_gib * 2**30)


@functools.cache
def all_chips() -> dict[str, Chip]:
    """Every chip by its name."""
    return read_chips(Path(__file__).parent / "chips.json")


def read_chips(path: Path) -> dict[str, Chip]:
    """The chips of a file in the form of chips.json. Raises InvalidConfigError for one that is not."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: _chip(name, entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfigError(f"{path} does not describe chips as backends/chips.json does: {error}") from error


def _chip(name: str, entry: dict[str, Any]) -> Chip:
    kinds, instances = tuple(entry["device_kinds"]), tuple(Instance(*one) for one in entry.get("instances", ()))
    return Chip(name=name, **{**entry, "device_kinds": kinds, "instances": instances})


def chips(platform: str = "tpu") -> dict[str, Chip]:
    """The chips of one platform by their names."""
    return {name: chip for name, chip in all_chips().items() if chip.platform == platform}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None for one that is not in the list."""
    return next((chip for chip in all_chips().values() if device_kind in chip.device_kinds), None)
