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
from quire.backends.stablehlo_ranges import Fact, Range, direction, fitted, result_range, union, whole


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
        self._module = module  # operations do not keep theirs alive
        self._functions = {
            (attribute(op, "sym_name") or "").strip('"'): op.operation
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        num_partitions = numbers(module, "mhlo.num_partitions")
        self._num_partitions = num_partitions[0] if num_partitions else 1

    def run(self) -> None:
        """Walks from `main` with nothing known of its arguments: whoever calls the program may be wrong about them."""
        block = self.body("main")
        arguments = [whole(tensor(argument)) for argument in block.arguments]
        _Frame(self, {}, NOWHERE, 1).block(block, arguments)

    def call(self, name: str, facts: Sequence[Fact], place: SourceLine, times: int) -> list[Fact]:
        """Walks a private function; gives what is known of its results."""
        return _Frame(self, {}, place, times).block(self.body(name), facts)

    def body(self, name: str) -> Any:
        """The block of a function."""
        (block,) = self._functions[name].regions[0].blocks
        return block

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
            return self._walker.call(_callee(op), facts, place, self._times)
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
        self._known.update(zip(carried, inside, strict=True))
        self._known.update(zip(condition.arguments, inside, strict=True))
        steps = [self._step(value, argument) for value, argument in zip(returned, carried, strict=True)]
        trips = self._trips(condition, facts, steps)
        if trips is not None:
            inside = [
                _counted(fact, first, step, trips) for fact, first, step in zip(inside, facts, steps, strict=True)
            ]
        self._tell(op, "stablehlo.while", facts, inside, place, trips)
        times = self._times * (1 if trips is None else trips)
        self._inside(place, 0).block(condition, inside)
        self._inside(place, times).block(body, inside)
        if trips is None:
            return inside
        kinds = [tensor(argument) for argument in carried]
        return [
            fact if step is None else fitted(_moved(first, step * trips), kind)
            for fact, first, step, kind in zip(inside, facts, steps, kinds, strict=True)
        ]

    def _trips(self, condition: Any, before: Sequence[Fact], steps: Sequence[int | None]) -> int | None:
        """How often a loop runs; None where it is not static.

        Static is what lax.scan and lax.fori_loop make: a counter that begins at a constant and is compared with a constant, and to
        which the body adds a constant.
        """
        comparison = _owner(list(condition.operations)[-1].operation.operands[0])
        if comparison is None or comparison.name != "stablehlo.compare":
            return None
        counted, limit = comparison.operands
        arguments = list(condition.arguments)
        if counted not in arguments:
            return None
        idx = arguments.index(counted)
        first, end, step = _number(before[idx]), _number(self._literal(limit)), steps[idx]
        if first is None or end is None or not step:
            return None
        match direction(comparison):
            case "LT" if step > 0:
                return len(range(first, end, step))
            case "LE" if step > 0:
                return len(range(first, end + 1, step))
            case "GT" if step < 0:
                return len(range(first, end, step))
            case "GE" if step < 0:
                return len(range(first, end - 1, step))
        return None

    def _step(self, value: Any, argument: Any) -> int | None:
        """What a body adds to a carried value from trip to trip, itself or in a function that it calls; None where it is not a constant."""
        owner = _owner(value)
        if owner is None:
            return None
        if owner.name == "stablehlo.add" and owner.operands[0] == argument:
            return _number(self._literal(owner.operands[1]))
        if owner.name == "func.call":
            block = self._walker.body(_callee(owner))
            returned = list(list(block.operations)[-1].operation.operands)[list(owner.results).index(value)]
            passed = list(owner.operands)
            if argument in passed:
                return self._step(returned, block.arguments[passed.index(argument)])
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


def _counted(inside: Fact, first: Fact, step: int | None, trips: int) -> Fact:
    """What is known in the body of a value that moves by `step` from trip to trip; `inside` where it does not."""
    if step is None or first is None or inside is None or trips == 0:
        return inside
    last = _moved(first, step * (trips - 1))
    together = union(first, last)
    # Where it would leave its type it wraps around.
    return together if together is not None and together.within(inside.low, inside.high) else inside


def _moved(fact: Fact, by: int) -> Fact:
    return None if fact is None else Range(fact.low + by, fact.high + by)


def _callee(call: Any) -> str:
    return (attribute(call, "callee") or "").lstrip("@").strip('"')
