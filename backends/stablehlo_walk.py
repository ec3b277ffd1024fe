"""Walking a StableHLO program in the order of its execution, with what is known of every value and how often every operation runs.

Private functions are entered at each call, with what is known there; bodies of static loops are walked once, with the counter's range;
bodies of loops that are not static, with nothing known of their counter. What a loop changes of other values is not followed: they may
be anything their type holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.backends.stablehlo_ir import NOWHERE, SourceLine, attribute, name_of, numbers, source_line, tensor
from quire.backends.stablehlo_ranges import Fact, Range, direction, result_range, whole


@dataclass(frozen=True)
class Visit:
    """One operation at one place in the execution."""

    op: Any
    name: str
    """As `stablehlo.add`."""
    facts: Sequence[Fact]
    """What is known of the operands."""
    results: Sequence[Fact]
    """And of the results."""
    times: int
    """How often a run of the program executes it; 0 inside the scalar function of a reduction, a scatter or a sort."""
    place: SourceLine
    fact_of: Callable[[Any], Fact]
    """What is known of another value of the same function, defined before this one."""
    trips: int | None = None
    """Of a while: how often its body runs, None where that is not a constant."""


class Walker:
    """Calls `visit` for every operation of a module; loops and calls before what is in them."""

    def __init__(self, module: Any, visit: Callable[[Visit], None]) -> None:
        self._visit = visit
        self._functions = {
            (attribute(op, "sym_name") or "").strip('"'): op.operation
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        num_partitions = numbers(module, "mhlo.num_partitions")
        self._num_partitions = num_partitions[0] if num_partitions else 1

    def run(self) -> None:
        """Walks from `main` with nothing known of its arguments: whoever calls the program may be wrong about them."""
        (block,) = self._functions["main"].regions[0].blocks
        arguments = [whole(tensor(argument)) for argument in block.arguments]
        _Frame(self, {}, NOWHERE, 1).block(block, arguments)

    def call(self, name: str, facts: Sequence[Fact], place: SourceLine, times: int) -> list[Fact]:
        """Walks a private function; gives what is known of its results."""
        (block,) = self._functions[name].regions[0].blocks
        return _Frame(self, {}, place, times).block(block, facts)

    def visit(self, visit: Visit) -> None:
        self._visit(visit)

    @property
    def num_partitions(self) -> int:
        return self._num_partitions


class _Frame:
    """One execution of a function's body, nested regions included."""

    def __init__(self, walker: Walker, known: dict[Any, Fact], place: SourceLine, times: int) -> None:
        self._walker = walker
        self._known = known
        self._place = place  # of what encloses this: for operations that do not say where they come from
        self._times = times

    def _inside(self, place: SourceLine, times: int) -> _Frame:
        return _Frame(self._walker, self._known, place, times)

    def fact(self, value: Any) -> Fact:
        """What is known of a value."""
        return self._known[value] if value in self._known else whole(tensor(value))

    def block(self, block: Any, facts: Sequence[Fact]) -> list[Fact]:
        """Walks the operations in order; gives what is known of the last one's operands, the block's results."""
        self._known.update(zip(block.arguments, facts, strict=True))
        returned: list[Fact] = []
        for op in block.operations:
            returned = [self.fact(operand) for operand in op.operation.operands]
            self._known.update(zip(op.operation.results, self._run(op.operation, returned), strict=True))
        return returned

    def _run(self, op: Any, facts: list[Fact]) -> list[Fact]:
        name, place = name_of(op), source_line(op) or self._place
        if name == "stablehlo.while":
            return self._while(op, facts, place)
        results = result_range(op, name, facts)
        if name == "stablehlo.partition_id":
            results = [Range(0, self._walker.num_partitions - 1)]
        self._tell(op, name, facts, results, place)
        if name == "func.call":
            callee = (attribute(op, "callee") or "").lstrip("@").strip('"')
            return self._walker.call(callee, facts, place, self._times)
        if name == "sdy.manual_computation":  # the program of one device: of what it is given it has a part
            return self._inside(place, self._times).block(op.regions[0].blocks[0], facts)
        self._regions(op, name, place)
        return results

    def _regions(self, op: Any, name: str, place: SourceLine) -> None:
        is_branch = name in ("stablehlo.if", "stablehlo.case")
        for region in op.regions:
            for block in region.blocks:
                arguments = [whole(tensor(argument)) for argument in block.arguments]
                self._inside(place, self._times if is_branch else 0).block(block, arguments)

    def _while(self, op: Any, facts: list[Fact], place: SourceLine) -> list[Fact]:
        condition, body = (region.blocks[0] for region in op.regions)
        carried = list(body.arguments)
        returned = list(list(body.operations)[-1].operation.operands)
        inside = [
            fact if value == argument else whole(tensor(argument))
            for argument, value, fact in zip(carried, returned, facts, strict=True)
        ]
        counter = self._counter(condition, body, inside, facts)
        trips = None
        if counter is not None:
            idx, values = counter
            trips, inside[idx] = len(values), _range_of(values, inside[idx])
        self._tell(op, "stablehlo.while", facts, inside, place, trips)
        times = self._times * (1 if trips is None else trips)
        self._inside(place, 0).block(condition, inside)
        self._inside(place, times).block(body, inside)
        after = list(inside)
        if counter is not None:
            idx, values = counter
            after[idx] = Range(values[-1] + values.step, values[-1] + values.step) if values else facts[idx]
        return after

    def _counter(
        self, condition: Any, body: Any, inside: Sequence[Fact], before: Sequence[Fact]
    ) -> tuple[int, range] | None:
        """Which carried value counts the trips, and the values that it has in the body; None where the loop is not static.

        Static is what lax.scan and lax.fori_loop make: a counter that begins at a constant, is compared with a constant, and to
        which the body adds a constant.
        """
        self._known.update(zip(condition.arguments, inside, strict=True))
        self._known.update(zip(body.arguments, inside, strict=True))
        verdict = list(condition.operations)[-1].operation.operands[0]
        comparison = _owner(verdict)
        if comparison is None or comparison.name != "stablehlo.compare":
            return None
        counted, limit = comparison.operands
        arguments = list(condition.arguments)
        if counted not in arguments:
            return None
        idx = arguments.index(counted)
        addition = _owner(list(list(body.operations)[-1].operation.operands)[idx])
        if addition is None or addition.name != "stablehlo.add" or addition.operands[0] != body.arguments[idx]:
            return None
        first, end, step = (
            _number(f) for f in (before[idx], self._literal(limit), self._literal(addition.operands[1]))
        )
        if first is None or end is None or not step:
            return None
        match direction(comparison):
            case "LT" if step > 0:
                return idx, range(first, end, step)
            case "LE" if step > 0:
                return idx, range(first, end + 1, step)
            case "GT" if step < 0:
                return idx, range(first, end, step)
            case "GE" if step < 0:
                return idx, range(first, end - 1, step)
        return None

    def _literal(self, value: Any) -> Fact:
        """What is known of a value in a body that was not walked yet: constants, and what stays the same from trip to trip."""
        owner = _owner(value)
        if owner is not None and owner.name == "stablehlo.constant":
            return result_range(owner, owner.name, ())[0]
        return self._known.get(value)

    def _tell(
        self,
        op: Any,
        name: str,
        facts: Sequence[Fact],
        results: Sequence[Fact],
        place: SourceLine,
        trips: int | None = None,
    ) -> None:
        self._walker.visit(Visit(op, name, facts, results, self._times, place, self.fact, trips))


def _owner(value: Any) -> Any:
    """The operation that gives a value; None for the argument of a block."""
    owner = value.owner
    operation = getattr(owner, "operation", owner)
    return operation if hasattr(operation, "operands") else None


def _number(fact: Fact) -> int | None:
    return int(fact.low) if fact is not None and fact.is_constant else None


def _range_of(values: range, fallback: Fact) -> Fact:
    return Range(min(values), max(values)) if values else fallback
