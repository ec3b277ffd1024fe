"""What an operation is: a contract, several implementations, and a choice that is made once and says why.

An `Op` lists its implementations from the most wanted to the reference, which runs everywhere. A backend calls `Op.choose` at
start with an `OpContext`; the answer carries the implementation taken and the reason for every one that was passed
over, and `describe` makes the line that is logged. An implementation asked for by name that cannot run is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from quire.kernels.errors import KernelUnavailableError

Function = TypeVar("Function")


@dataclass(frozen=True)
class OpContext:
    """What decides whether an implementation can serve: the device and the static numbers of the model."""

    platform: str
    device_kind: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_devices: int = 1
    """That share the model; the numbers of heads are those of one of them."""
    quantization: str = "none"
    scan_layers: bool = False
    has_experts: bool = False
    instruction_sets: frozenset[str] = frozenset()
    """What the host's processor can do, as Linux names it; for CPUs only."""
    nki_self_test: str | None = "their self-test was not run"
    """Why the NKI kernels are not to be trusted on this device; None once a self-test found them to agree with the reference."""


@dataclass(frozen=True)
class Implementation(Generic[Function]):
    """One way to do an op. `refuses` gives the reason why it cannot serve a context, or None when it can."""

    name: str
    function: Function
    refuses: Callable[[OpContext], str | None] = lambda _: None
    by_name_only: bool = False
    """For trying out: passed by in silence unless asked for by name."""


@dataclass(frozen=True)
class Choice(Generic[Function]):
    """The implementation taken for an op, and why each one before it in the list was not."""

    op: str
    name: str
    function: Function
    passed_over: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """One line for the log: `paged_attention: reference (pallas_tpu: needs a TPU)`."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
        return f"{self.op}: {self.name}" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Op(Generic[Function]):
    """An operation: its name and its implementations, the most wanted first, the reference last."""

    name: str
    implementations: tuple[Implementation[Function], ...]

    def choose(self, context: OpContext, wanted: str | None = None) -> Choice[Function]:
        """The first implementation that can serve `context`, or exactly `wanted`.

        Raises KernelUnavailableError when `wanted` is unknown or refuses, with its reason.
        """
        names = [implementation.name for implementation in self.implementations]
        if wanted is not None and wanted not in names:
            raise KernelUnavailableError(f"{self.name} has no implementation {wanted!r}; there are: {', '.join(names)}")
        passed_over: list[tuple[str, str]] = []
        for implementation in self.implementations:
            if implementation.name != wanted and (wanted is not None or implementation.by_name_only):
                continue
            reason = implementation.refuses(context)
            if reason is None:
                return Choice(self.name, implementation.name, implementation.function, tuple(passed_over))
            passed_over.append((implementation.name, reason))
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
        raise KernelUnavailableError(f"no implementation of {self.name} can serve {context}: {reasons}")
