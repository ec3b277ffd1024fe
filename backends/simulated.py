"""Chips that are not here: everything is decided as on the real ones, and steps take the time that a roofline gives them.

Nothing is computed, so nothing is compiled and no weights are read: `quire.engine.simulation` runs the steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from quire.backends.base import Capabilities, Program, WrappedBackend
from quire.backends.chips import Chip, all_chips, read_chips
from quire.backends.neuron import NeuronBackend
from quire.backends.roofline import Roofline, read_efficiencies
from quire.backends.tpu import TpuBackend
from quire.kernels.errors import BackendError


class SimulatedBackend(WrappedBackend):
    """So many devices of a chip, named as v5e:8 is; sizes, limits and memory are those of the backend that drives real ones."""

    def __init__(self, target: str, *, chips_file: Path | None = None, efficiency_file: Path | None = None) -> None:
        """`chips_file` adds to, or replaces, the chips that are known, and `efficiency_file` what they reach of their numbers.

        Raises BackendError for an unknown chip, InvalidConfigError for a file that cannot be read.
        """
        known = {**all_chips(), **(read_chips(chips_file) if chips_file else {})}
        efficiencies = {**read_efficiencies(), **(read_efficiencies(efficiency_file) if efficiency_file else {})}
        self.chip, self.num_devices = _parse(target, known)
        if self.chip.name not in efficiencies:
            raise BackendError(
                f"nothing says how much of its numbers {self.chip.name} reaches; give a file like backends/efficiency.json"
            )
        self.efficiency = efficiencies[self.chip.name]
        # Nothing runs on them, so whatever jax computes is the CPU's.
        jax.config.update("jax_platforms", "cpu")
        if self.chip.platform == "neuron":
            super().__init__(NeuronBackend(self.chip, self.num_devices))
        else:
            super().__init__(TpuBackend(only_planned=(self.chip, self.num_devices)))

    def roofline(self, num_devices: int) -> Roofline:
        """Of so many of the devices."""
        return Roofline(self.chip, self.efficiency.efficiency, num_devices)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the real devices, by a name that says that these are none."""
        return dataclasses.replace(self._inner.capabilities, platform=f"simulated {self.chip.name}")

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        raise BackendError(f"a simulated {self.chip.name} computes nothing, so there is nothing to lower for it")

    def compile(self, lowered: Any) -> Program:
        raise BackendError(f"a simulated {self.chip.name} computes nothing, so there is nothing to compile for it")

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        raise BackendError(f"a simulated {self.chip.name} computes nothing, so there is nothing to profile")


def _parse(target: str, known: dict[str, Chip]) -> tuple[Chip, int]:
    """CHIP, CHIP:DEVICES or CHIP:AxB. Raises BackendError for anything else."""
    match = re.fullmatch(r"(\w+)(?::([1-9]\d*(?:x[1-9]\d*)*))?", target)
    if match is None or match[1] not in known:
        raise BackendError(
            f"device {target!r} is not of the form CHIP or CHIP:DEVICES, as v5e:8 or inf2:24 is; chips: {', '.join(known)}"
        )
    count = 1
    for size in (match[2] or "1").split("x"):
        count *= int(size)
    return known[match[1]], count
