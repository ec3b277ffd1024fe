"""What a kernel costs by the documented numbers: bytes and descriptors of DMA, cycles per engine, and two bounds on its time.

Good for comparing kernels, not for predicting one: nothing here knows of queues, semaphores or hazards between engines.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MIN_CYCLES = 64  # between two instructions of one engine, however small
GPSIMD_START = 150
DMA_LATENCY_S = 2e-6
DMA_BYTES_PER_S = 16 * 27 * 2**30  # sixteen engines
# Rows below 512 B are documented as inefficient, by how much is not: a short row is taken to last as long as one of 512 B.
EFFICIENT_ROW_BYTES = 512


@dataclass(frozen=True)
class Clocks:
    """Of the four compute engines, in Hz."""

    tensor: float
    vector: float
    scalar: float
    gpsimd: float


@dataclass
class Costs:
    """Totals over a kernel; `instructions` and `cycles` by engine."""

    instructions: Counter[str] = field(default_factory=Counter)
    cycles: Counter[str] = field(default_factory=Counter)
    dma_bytes: int = 0
    dma_descriptors: int = 0
    dma_row_bytes: int = 0
    """Bytes with every row counted as 512 at least."""
    peak_sbuf_bytes: int = 0
    peak_psum_banks: int = 0

    def compute(self, engine: str, cycles: int) -> None:
        """One instruction that takes `cycles` once its engine is free."""
        self.instructions[engine] += 1
        self.cycles[engine] += max(cycles, MIN_CYCLES) + (GPSIMD_START if engine == "gpsimd" else 0)

    def dma(self, num_bytes: int, num_rows: int) -> None:
        """One copy of `num_rows` contiguous pieces."""
        self.instructions["dma"] += 1
        self.dma_bytes += num_bytes
        self.dma_descriptors += num_rows
        self.dma_row_bytes += max(num_bytes, num_rows * EFFICIENT_ROW_BYTES)

    def add(self, other: Costs) -> None:
        """Another core's costs; its time runs beside this one's, so cycles are added as work, not as time."""
        self.instructions.update(other.instructions)
        self.cycles.update(other.cycles)
        self.dma_bytes += other.dma_bytes
        self.dma_descriptors += other.dma_descriptors
        self.dma_row_bytes += other.dma_row_bytes
        self.peak_sbuf_bytes = max(self.peak_sbuf_bytes, other.peak_sbuf_bytes)
        self.peak_psum_banks = max(self.peak_psum_banks, other.peak_psum_banks)

    def seconds(self, clocks: Clocks, hbm_bytes_per_s: float) -> dict[str, float]:
        """Busy time of each engine and of DMA."""
        busy = {engine: cycles / getattr(clocks, engine) for engine, cycles in self.cycles.items()}
        busy["dma"] = self.dma_row_bytes / min(DMA_BYTES_PER_S, hbm_bytes_per_s)
        return busy

    def least_seconds(self, clocks: Clocks, hbm_bytes_per_s: float) -> float:
        """If everything overlaps that can: VectorE and GpSimd share a port to SBUF (documented for gen2, assumed for all)."""
        busy = self.seconds(clocks, hbm_bytes_per_s)
        busy["vector"] = busy.get("vector", 0.0) + busy.pop("gpsimd", 0.0)
        return max(busy.values())

    def most_seconds(self, clocks: Clocks, hbm_bytes_per_s: float) -> float:
        """If nothing overlaps."""
        return sum(self.seconds(clocks, hbm_bytes_per_s).values()) + self.instructions["dma"] * DMA_LATENCY_S
