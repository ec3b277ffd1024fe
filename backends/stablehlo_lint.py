"""What neuronx-cc would refuse or get wrong in a lowered program, found on any machine: the rule, the op, its line of Python.

Three designs were weighed. (1) Regular expressions over the text: short, but they see neither through calls nor where an index comes
from, and name no source line. (2) A pass over jaxprs: source lines come for free, but what the compiler is given is StableHLO, and jax's
lowerings decide about gathers, sorts and top_k. (3) A walk over the MLIR module that jax hands to the compiler, with intervals for every
integer: an index is clipped when its interval says so, whatever the code looked like. (3) it is.

No argument of a program is trusted, not even block tables and slots, which the host makes and has checked: to clip them costs a few
elements per step, and a wrong one is then a wrong token rather than a device that has to be reset.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from jax.interpreters import mlir

from quire.backends.neuron_instructions import instructions
from quire.backends.neuron_rules import GENERATIONS, MAX_INSTRUCTIONS, RULES, Rule, Severity
from quire.backends.stablehlo_checks import breaks
from quire.backends.stablehlo_ir import NOWHERE, SourceLine, tensor
from quire.backends.stablehlo_walk import Visit, Walker
from quire.kernels.errors import InvalidConfigError


@dataclass(frozen=True)
class Finding:
    """A rule that an operation breaks."""

    rule: Rule
    op: str
    """As `stablehlo.gather`; empty where the finding is about the whole program."""
    shapes: str
    """Of operands and results: `f32[4,8], i32[2,1] -> f32[2,8]`."""
    detail: str
    place: SourceLine

    def describe(self) -> str:
        """Two lines: what is wrong and where; why, and the remedy."""
        where = f"{self.place}: " if self.op else ""
        what = f"{self.op} {self.shapes}: " if self.op else ""
        return (
            f"{self.rule.severity.value}: {where}{self.rule.name}: {what}{self.detail}\n"
            f"    {self.rule.because}; remedy: {self.rule.remedy}"
        )


@dataclass(frozen=True)
class LintReport:
    """What was found in one program."""

    findings: tuple[Finding, ...]
    instructions: int
    """Estimated, see `neuron_instructions`."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What keeps the program from being compiled, or from giving the right numbers."""
        return tuple(finding for finding in self.findings if finding.rule.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may cost time, or was never looked up."""
        return tuple(finding for finding in self.findings if finding.rule.severity is Severity.WARNING)

    def describe(self) -> str:
        """Every finding, errors first, and the size of the program."""
        lines = [finding.describe() for finding in (*self.errors, *self.warnings)]
        share = self.instructions / MAX_INSTRUCTIONS
        return "\n".join([*lines, f"about {self.instructions:,} instructions, {share:.1%} of what the compiler takes"])


def lint(lowered: Any, *, generation: str = "v2") -> LintReport:
    """Looks at a program as a NeuronCore's compiler would.

    `lowered` is what `jax.jit(f).lower(...)` gives, an MLIR module of StableHLO, or its text; text without debug information gives findings
    without places. Raises InvalidConfigError for a generation that is none of GENERATIONS.
    """
    if generation not in GENERATIONS:
        raise InvalidConfigError(f"generation={generation!r} is no NeuronCore; there are: {', '.join(GENERATIONS)}")
    found: Counter[Finding] = Counter()  # in the order of the program; what a function breaks it breaks at every call
    total = 0

    def visit(visit: Visit) -> None:
        nonlocal total
        total += visit.times * instructions(visit.op, visit.name)
        for name, detail in breaks(visit, generation):
            found[Finding(RULES[name], visit.name, _shapes(visit.op), detail, visit.place)] += 1

    Walker(_module(lowered), visit).run()
    if total > MAX_INSTRUCTIONS:
        detail = f"about {total:,} instructions"
        found[Finding(RULES["too-many-instructions"], "", "", detail, NOWHERE)] += 1
    return LintReport(tuple(found), total)


def _module(lowered: Any) -> Any:
    if isinstance(lowered, str):
        with mlir.make_ir_context():
            return mlir.ir.Module.parse(lowered)
    return lowered.compiler_ir("stablehlo") if hasattr(lowered, "compiler_ir") else lowered


def _shapes(op: Any) -> str:
    operands = ", ".join(str(tensor(value)) for value in op.operation.operands)
    return f"{operands} -> {', '.join(str(tensor(value)) for value in op.operation.results)}"
