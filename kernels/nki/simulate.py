"""Running a kernel on emulated cores: arrays in, arrays and costs out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.kernels.nki.core import GENERATIONS, Core, Generation, running
from quire.kernels.nki.costs import Costs
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import EMPTY, SHARED_HBM, NkiTensor, Storage, from_array

CONSTANTS = (bool, int, float, str, type(None), tuple)


@dataclass(frozen=True)
class Simulation:
    """What a kernel returned, and what it cost on a generation."""

    outputs: tuple[np.ndarray, ...]
    costs: Costs
    generation: Generation

    @property
    def output(self) -> np.ndarray:
        """Of a kernel that returns one tensor."""
        (output,) = self.outputs
        return output

    def least_seconds(self) -> float | None:
        """A bound on the time if all overlaps that can, or None where the generation's clocks are not public."""
        clocks = self.generation.clocks
        return None if clocks is None else self.costs.least_seconds(clocks, self.generation.hbm_bytes_per_s)

    def most_seconds(self) -> float | None:
        """A bound on the time if nothing overlaps."""
        clocks = self.generation.clocks
        return None if clocks is None else self.costs.most_seconds(clocks, self.generation.hbm_bytes_per_s)


def simulate(kernel: Callable[..., Any], *arguments: Any, generation: str = "gen2", lnc: int = 1) -> Simulation:
    """Runs `kernel` by the rules of a generation, on `lnc` physical cores one after the other.

    Args:
        kernel: a function over NKI tensors that returns tensors in shared_hbm, or inputs that it wrote to.
        arguments: arrays, which become tensors in HBM, and constants. Arrays are copied; none is written to.
        generation: gen2 (trn1, inf2), gen3 (trn2) or gen4 (trn3).
        lnc: physical cores of the logical one.

    Raises NkiError where the kernel breaks a rule.
    """
    chosen = GENERATIONS[generation]
    shared: list[Storage] = []
    cores = [Core(chosen, program_id=i, num_programs=lnc, shared=shared) for i in range(lnc)]
    with running(cores[0]):
        if lnc not in ((1,) if chosen.number < 3 else (1, 2)):
            refuse("lnc", f"lnc={lnc} on {generation}; gen2 has 1, later ones 1 or 2")
        _check_parameters(kernel)
        inputs = [_argument(argument) for argument in arguments]
    for core in cores:
        with running(core):
            returned = kernel(*inputs)
    with running(cores[0]):
        outputs = tuple(_output(tensor, inputs) for tensor in _as_tuple(returned))
    for core in cores[1:]:
        cores[0].costs.add(core.costs)
    return Simulation(outputs, cores[0].costs, chosen)


def _check_parameters(kernel: Callable[..., Any]) -> None:
    for parameter in inspect.signature(kernel).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            refuse("argument", f"{parameter.name} is keyword-only; make it positional")


def _argument(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return from_array(argument)
    if not isinstance(argument, CONSTANTS):
        refuse("argument", f"an argument of type {type(argument).__name__}; give arrays, numbers, strings or tuples")
    return argument


def _as_tuple(returned: Any) -> tuple[Any, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def _output(tensor: Any, inputs: list[Any]) -> np.ndarray:
    is_input = any(tensor is given for given in inputs)
    if not isinstance(tensor, NkiTensor) or not (is_input or tensor.buffer == SHARED_HBM):
        refuse("output", f"the kernel returned {tensor!r}; return tensors in shared_hbm, or inputs themselves")
    unwritten = int((tensor.state == EMPTY).sum())
    if unwritten:
        refuse("output-unwritten", f"{unwritten} of {tensor.values.size} elements of {tensor!r} were never written")
    return tensor.values.copy()
