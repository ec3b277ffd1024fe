"""Interval arithmetic over StableHLO: between which two numbers every element of an array provably lies.

A range holds for all elements of an array at once. What is not understood is `None` for floats and the type's whole range for integers, so
a range is never narrower than the truth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.backends.stablehlo_ir import Tensor, attribute, constant_bounds, numbers, tensor


@dataclass(frozen=True)
class Range:
    """Both ends included; of float arrays too, which then hold no NaN."""

    low: float
    high: float

    @property
    def is_constant(self) -> bool:
        return self.low == self.high

    def within(self, low: float, high: float) -> bool:
        return low <= self.low and self.high <= high


Fact = Range | None
Transfer = Callable[[Any, Sequence[Fact]], Fact]


def whole(kind: Tensor) -> Fact:
    """All that the type can hold; None for floats."""
    if kind.element == "i1":
        return Range(0, 1)
    match = re.fullmatch(r"(u?)i(\d+)", kind.element)
    if match is None:
        return None
    bits = int(match[2])
    return Range(0, 2**bits - 1) if match[1] else Range(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def fitted(fact: Fact, kind: Tensor) -> Fact:
    """The range, or the type's whole one where arithmetic may have wrapped around."""
    bounds = whole(kind)
    if bounds is None or fact is None:
        return fact if bounds is None else bounds
    return fact if fact.within(bounds.low, bounds.high) else bounds


def union(*facts: Fact) -> Fact:
    """What holds of values that are of any of these."""
    known = [fact for fact in facts if fact is not None]
    if len(known) < len(facts) or not known:
        return None
    return Range(min(fact.low for fact in known), max(fact.high for fact in known))


def result_range(op: Any, name: str, facts: Sequence[Fact]) -> list[Fact]:
    """What is known of each result, from what is known of the operands."""
    results = op.operation.results
    transfer = _TRANSFERS.get(name)
    if name == "chlo.top_k":
        return [facts[0], Range(0, tensor(op.operation.operands[0]).shape[-1] - 1)]
    if name in _ELEMENT_FOR_ELEMENT and len(results) == len(facts):
        return list(facts)
    if transfer is None or len(results) != 1:
        return [whole(tensor(result)) for result in results]
    return [fitted(transfer(op, facts), tensor(results[0]))]


def raw_sum_or_product(op: Any, name: str, facts: Sequence[Fact]) -> Fact:
    """What an addition, subtraction or multiplication gives before it is cut to the type."""
    return _TRANSFERS[name](op, facts)


def _constant(op: Any, facts: Sequence[Fact]) -> Fact:
    bounds = constant_bounds(op)
    return None if bounds is None else Range(*bounds)


def _iota(op: Any, facts: Sequence[Fact]) -> Fact:
    dimension = numbers(op, "iota_dimension")[0]
    return Range(0, max(0, tensor(op.operation.results[0]).shape[dimension] - 1))


def _same(op: Any, facts: Sequence[Fact]) -> Fact:
    return facts[0]


def _convert(op: Any, facts: Sequence[Fact]) -> Fact:
    source, target = tensor(op.operation.operands[0]), tensor(op.operation.results[0])
    fact = facts[0]
    if fact is None or target.element == "i1":
        return whole(target)
    exact = {"f32": 2**24, "bf16": 2**8, "f16": 2**11}.get(target.element)
    if exact is not None and not fact.within(-exact, exact):
        return None
    # Fractions are cut towards zero, which stays between the same whole numbers.
    cuts = not source.is_integer and target.is_integer
    return Range(int(fact.low), int(fact.high)) if cuts and _is_finite(fact) else fact


def _is_finite(fact: Range) -> bool:
    return fact.within(-(2.0**63), 2.0**63)


def _any_of(op: Any, facts: Sequence[Fact]) -> Fact:
    return union(*(fact for fact, value in zip(facts, op.operation.operands, strict=True) if tensor(value).size))


def _select(op: Any, facts: Sequence[Fact]) -> Fact:
    predicate, on_true, on_false = facts
    if predicate is not None and predicate.is_constant:
        return on_true if predicate.low else on_false
    return union(on_true, on_false)


def _clamp(op: Any, facts: Sequence[Fact]) -> Fact:
    low, value, high = facts
    return _minimum(op, (_maximum(op, (value, low)), high))


def _maximum(op: Any, facts: Sequence[Fact]) -> Fact:
    left, right = facts
    return None if left is None or right is None else Range(max(left.low, right.low), max(left.high, right.high))


def _minimum(op: Any, facts: Sequence[Fact]) -> Fact:
    left, right = facts
    return None if left is None or right is None else Range(min(left.low, right.low), min(left.high, right.high))


def _whole_numbers(op: Any, facts: Sequence[Fact]) -> tuple[Range, Range] | None:
    """Two known operands, of integers: floats are rounded, so their arithmetic is not followed."""
    left, right = facts
    if left is None or right is None or not tensor(op.operation.results[0]).is_integer:
        return None
    return left, right


def _add(op: Any, facts: Sequence[Fact]) -> Fact:
    known = _whole_numbers(op, facts)
    return None if known is None else Range(known[0].low + known[1].low, known[0].high + known[1].high)


def _subtract(op: Any, facts: Sequence[Fact]) -> Fact:
    known = _whole_numbers(op, facts)
    return None if known is None else Range(known[0].low - known[1].high, known[0].high - known[1].low)


def _multiply(op: Any, facts: Sequence[Fact]) -> Fact:
    known = _whole_numbers(op, facts)
    if known is None:
        return None
    left, right = known
    corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    return Range(min(corners), max(corners))


def _divide(op: Any, facts: Sequence[Fact]) -> Fact:
    known = _whole_numbers(op, facts)
    if known is None or known[1].low < 1:
        return None
    value, divisor = known
    corners = [_cut(a, b) for a in (value.low, value.high) for b in (divisor.low, divisor.high)]
    return Range(min(corners), max(corners))


def _cut(value: float, divisor: float) -> int:
    """Division of whole numbers, rounded towards zero."""
    quotient = abs(int(value)) // int(divisor)
    return quotient if value >= 0 else -quotient


def _remainder(op: Any, facts: Sequence[Fact]) -> Fact:
    known = _whole_numbers(op, facts)
    if known is None or known[1].low < 1:
        return None
    value, divisor = known
    # The sign is the dividend's, and it stays as it is below the divisor.
    high = 0 if value.high <= 0 else min(value.high, divisor.high - 1)
    low = 0 if value.low >= 0 else max(value.low, 1 - divisor.high)
    return Range(low, high)


def _and(op: Any, facts: Sequence[Fact]) -> Fact:
    left, right = facts
    if left is None or right is None:
        return None
    if tensor(op.operation.results[0]).element == "i1":
        return Range(min(left.low, right.low), min(left.high, right.high))
    # With a number that is not negative, bits are only taken away from it.
    highs = [fact.high for fact in (left, right) if fact.low >= 0]
    return Range(0, min(highs)) if highs else None


def _or(op: Any, facts: Sequence[Fact]) -> Fact:
    left, right = facts
    if left is None or right is None or left.low < 0 or right.low < 0:
        return None
    if tensor(op.operation.results[0]).element == "i1" and op.operation.name == "stablehlo.or":
        return Range(max(left.low, right.low), max(left.high, right.high))
    return Range(0, (1 << max(int(left.high), int(right.high)).bit_length()) - 1)


def _not(op: Any, facts: Sequence[Fact]) -> Fact:
    fact = facts[0]
    if fact is None or tensor(op.operation.results[0]).element != "i1":
        return None
    return Range(1 - fact.high, 1 - fact.low)


def _shift_right(op: Any, facts: Sequence[Fact]) -> Fact:
    value, by = facts
    if value is None or by is None or value.low < 0 or by.low < 0:
        return None
    return Range(int(value.low) >> min(64, int(by.high)), int(value.high) >> min(64, int(by.low)))


def _negate(op: Any, facts: Sequence[Fact]) -> Fact:
    fact = facts[0]
    return None if fact is None else Range(-fact.high, -fact.low)


def _absolute(op: Any, facts: Sequence[Fact]) -> Fact:
    fact = facts[0]
    if fact is None:
        return None
    low = 0 if fact.low <= 0 <= fact.high else min(abs(fact.low), abs(fact.high))
    return Range(low, max(abs(fact.low), abs(fact.high)))


def _sign(op: Any, facts: Sequence[Fact]) -> Fact:
    fact = facts[0]
    return None if fact is None else Range(_sign_of(fact.low), _sign_of(fact.high))


def _sign_of(number: float) -> int:
    return (number > 0) - (number < 0)


_COMPARISONS: dict[str, Callable[[Range, Range], tuple[bool, bool]]] = {
    # Whether it holds for certain, whether it fails for certain.
    "LT": lambda a, b: (a.high < b.low, a.low >= b.high),
    "LE": lambda a, b: (a.high <= b.low, a.low > b.high),
    "GT": lambda a, b: (a.low > b.high, a.high <= b.low),
    "GE": lambda a, b: (a.low >= b.high, a.high < b.low),
    "EQ": lambda a, b: (a.is_constant and a == b, a.high < b.low or a.low > b.high),
    "NE": lambda a, b: (a.high < b.low or a.low > b.high, a.is_constant and a == b),
}


def direction(op: Any) -> str:
    """LT, LE, GT, GE, EQ or NE, of a comparison."""
    match = re.search(r"\b(LT|LE|GT|GE|EQ|NE)\b", attribute(op, "comparison_direction") or "")
    assert match is not None, f"a comparison without a direction: {op}"
    return match[1]


def _compare(op: Any, facts: Sequence[Fact]) -> Fact:
    left, right = facts
    if left is None or right is None:
        return None
    holds, fails = _COMPARISONS[direction(op)](left, right)
    return Range(int(holds), int(not fails))


def _reduce(op: Any, facts: Sequence[Fact]) -> Fact:
    """Of one array, by one operation; a sum is bounded by as many of the largest elements."""
    value, initial = facts
    (region,) = op.operation.regions
    inner = [name for name in (each.operation.name for each in region.blocks[0]) if name != "stablehlo.return"]
    if value is None or initial is None or len(inner) != 1:
        return None
    source, target = tensor(op.operation.operands[0]), tensor(op.operation.results[0])
    count = source.size // max(1, target.size)
    match inner[0]:
        case "stablehlo.minimum":
            return _minimum(op, facts) if count else None
        case "stablehlo.maximum":
            return _maximum(op, facts) if count else None
        case "stablehlo.and":
            return _and(op, facts)
        case "stablehlo.or":
            return _or_of_bits(target, value, initial)
        case "stablehlo.add" if target.is_integer:
            return Range(initial.low + count * value.low, initial.high + count * value.high)
    return None


def _or_of_bits(target: Tensor, value: Range, initial: Range) -> Fact:
    if target.element != "i1":
        return None
    return Range(max(value.low, initial.low), max(value.high, initial.high))


def _first_and_last(op: Any, facts: Sequence[Fact]) -> Fact:
    """Of operations that write some of the last operand into the first: updates of slices."""
    return union(facts[0], facts[1])


def _scatter(op: Any, facts: Sequence[Fact]) -> Fact:
    return union(facts[0], facts[2]) if len(facts) == 3 and is_overwriting(op) else None


def is_overwriting(op: Any) -> bool:
    """Whether a scatter puts the update in the place of what is there, rather than combine the two."""
    (region,) = op.operation.regions
    block = region.blocks[0]
    operations = list(block)
    half = len(block.arguments) // 2
    returned = list(operations[-1].operation.operands)
    return len(operations) == 1 and returned == list(block.arguments)[half:]


def _custom_call(op: Any, facts: Sequence[Fact]) -> Fact:
    target = (attribute(op, "call_target_name") or "").strip('"')
    return facts[0] if target == "Sharding" else None


_TRANSFERS: dict[str, Transfer] = {
    "stablehlo.constant": _constant,
    "stablehlo.iota": _iota,
    "stablehlo.convert": _convert,
    "stablehlo.select": _select,
    "stablehlo.clamp": _clamp,
    "stablehlo.maximum": _maximum,
    "stablehlo.minimum": _minimum,
    "stablehlo.add": _add,
    "stablehlo.subtract": _subtract,
    "stablehlo.multiply": _multiply,
    "stablehlo.divide": _divide,
    "stablehlo.remainder": _remainder,
    "stablehlo.and": _and,
    "stablehlo.or": _or,
    "stablehlo.xor": _or,
    "stablehlo.not": _not,
    "stablehlo.shift_right_logical": _shift_right,
    "stablehlo.shift_right_arithmetic": _shift_right,
    "stablehlo.negate": _negate,
    "stablehlo.abs": _absolute,
    "stablehlo.sign": _sign,
    "stablehlo.compare": _compare,
    "stablehlo.reduce": _reduce,
    "stablehlo.concatenate": _any_of,
    "stablehlo.pad": _any_of,
    "stablehlo.dynamic_update_slice": _first_and_last,
    "stablehlo.scatter": _scatter,
    "stablehlo.custom_call": _custom_call,
    **dict.fromkeys(
        (
            "stablehlo.broadcast_in_dim",
            "stablehlo.reshape",
            "stablehlo.transpose",
            "stablehlo.slice",
            "stablehlo.reverse",
            "stablehlo.gather",
            "stablehlo.dynamic_slice",
            "stablehlo.all_gather",
            "stablehlo.all_to_all",
            "sdy.sharding_constraint",
        ),
        _same,
    ),
}
# Results of these are made of the elements of the operand in their place.
_ELEMENT_FOR_ELEMENT = ("stablehlo.optimization_barrier", "stablehlo.sort")
