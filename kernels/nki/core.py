"""The NeuronCore that an emulated kernel runs on: its generation, how full its memories are, and what the kernel has cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from quire.kernels.nki import rules
from quire.kernels.nki.costs import Clocks, Costs
from quire.kernels.nki.rules import refuse

PARTITIONS = 128
PSUM_BANKS = 8
PSUM_BANK_BYTES = 2048  # per partition


@dataclass(frozen=True)
class Generation:
    """What differs between NeuronCore-v2, v3 and v4."""

    name: str
    number: int
    sbuf_bytes: int  # per partition
    max_moving: int  # elements per partition of a matmul's moving tensor
    clocks: Clocks | None  # None where they are not public
    hbm_bytes_per_s: float  # one core's share of its chip's


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("gen2", 2, 192 * 1024, 512, Clocks(2.8e9, 1.12e9, 1.4e9, 1.4e9), 820e9 / 2),
        Generation("gen3", 3, 224 * 1024, 512, Clocks(2.4e9, 0.96e9, 1.2e9, 1.2e9), 2900e9 / 8),
        Generation("gen4", 4, 256 * 1024, 512 * PSUM_BANKS, None, 4900e9 / 8),
    )
}


@dataclass
class Core:
    """One core while it runs one kernel."""

    generation: Generation
    program_id: int = 0
    num_programs: int = 1
    costs: Costs = field(default_factory=Costs)
    sbuf_in_use: int = 0  # bytes per partition
    banks_in_use: int = 0
    shared: list[Any] = field(default_factory=list)
    """Storages in shared_hbm in the order of their allocation: the same for all programs of a launch."""
    num_shared: int = 0

    def take_sbuf(self, num_bytes: int) -> None:
        """Tensors live as long as the kernel holds them, which is at least as long as the compiler's liveness has it."""
        limit = self.generation.sbuf_bytes
        if self.sbuf_in_use + num_bytes > limit:
            refuse(
                "sbuf-capacity",
                f"{num_bytes} B per partition do not fit beside the {self.sbuf_in_use} B in use of {limit} B; "
                "use smaller tiles or drop some",
            )
        self.sbuf_in_use += num_bytes
        self.costs.peak_sbuf_bytes = max(self.costs.peak_sbuf_bytes, self.sbuf_in_use)

    def take_banks(self, num_banks: int) -> None:
        """Whole banks, all partitions of them: how the compiler packs PSUM is not documented."""
        if self.banks_in_use + num_banks > PSUM_BANKS:
            refuse(
                "psum-capacity",
                f"{num_banks} bank(s) do not fit beside the {self.banks_in_use} in use of {PSUM_BANKS}; "
                "copy results to SBUF and drop the PSUM tensors",
            )
        self.banks_in_use += num_banks
        self.costs.peak_psum_banks = max(self.costs.peak_psum_banks, self.banks_in_use)

    def give_sbuf(self, num_bytes: int) -> None:
        """Takes back what `take_sbuf` gave."""
        self.sbuf_in_use -= num_bytes

    def give_banks(self, num_banks: int) -> None:
        """Takes back what `take_banks` gave."""
        self.banks_in_use -= num_banks


_running: ContextVar[Core | None] = ContextVar("running", default=None)


@contextmanager
def running(core: Core) -> Iterator[Core]:
    """Instructions issued inside are `core`'s."""
    token, generation_token = _running.set(core), rules.generation.set(core.generation.name)
    try:
        yield core
    finally:
        _running.reset(token)
        rules.generation.reset(generation_token)


def current() -> Core:
    """The core that instructions go to."""
    core = _running.get()
    assert core is not None, "NKI instructions are only issued inside simulate()"
    return core


def generation_name() -> str:
    """gen2, gen3 or gen4."""
    return current().generation.name


def require_generation(number: int, what: str, remedy: str) -> None:
    """Refuses on generations before `number`."""
    if current().generation.number < number:
        refuse("generation", f"{what} needs gen{number}, this is {generation_name()}; {remedy}")
