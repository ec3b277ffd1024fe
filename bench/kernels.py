"""`quire bench kernels`: what the TPU compiler makes of the attention kernels, quire's beside jax's, without a TPU.

Each kernel is compiled for one chip in a process of its own, which has the compiler write down its final code: *bundles*, one of which
is begun per clock cycle. From them and the shape follow

    bundles_per_512_keys   of the loop over tiles of keys, for all key/value heads of a row; branches of it that a whole tile
                           does not take are counted once
    compute_us             all loops of the call, at the chip's clock
    bound_us               the keys and values of the shape over the chip's memory bandwidth: nothing can be faster
    estimate_us            copies and work as a pipeline of tiles: the first copy, the longer of both, the last tile's work
    around_us              what XLA does before and after to bring arrays into the kernel's shapes, by the compiler's own estimate

Nothing runs, so latencies that the compiler does not know of, and memory that is slower than its data sheet, are not in these numbers.
Prints one JSON line per kernel and shape, and a table to stderr. jax's kernels are given the same 512 keys at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quire.backends.chips import Chip, chips
from quire.bench import nki_kernels
from quire.bench.kernel_programs import KEYS_PER_TILE, KernelShape, job, ragged_queries

DECODE = KernelShape("decode")
SHAPES = [
    DECODE,
    replace(DECODE, name="decode, blocks of 16", block_size=16),
    replace(DECODE, name="decode, blocks of 128", block_size=128),
    replace(DECODE, name="decode, head_dim 64", head_dim=64),
    replace(DECODE, name="decode, multi-query", num_heads=8, num_kv_heads=1),
    replace(DECODE, name="verify 5", width=5),
    KernelShape("prefill tiles of 128", rows=8, width=128),
]
OURS, RAGGED, PAGED = KERNELS = ("paged_attention", "jax_ragged_paged_attention", "jax_paged_attention")

# Functional units in the compiler's table of what each bundle uses, with how many of each a bundle can use.
_UNITS = re.compile(r"^(MXU, .*)$\n((?: *\d+)+)$", re.MULTILINE)
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +((?:[A-Z]{2}:? *)*):? *(>*) *\{ *(?!\})(.*)$", re.MULTILINE)
_MATRIX_PRODUCT = "vmatmul"


@dataclass(frozen=True)
class Loop:
    """A loop of a compiled kernel: its bundles are those from `begin` up to `end`, loops within it included."""

    begin: int
    end: int
    depth: int
    num_products: int

    @property
    def bundles(self) -> int:
        return self.end - self.begin

    def contains(self, other: Loop) -> bool:
        """Whether another loop is inside."""
        return self.depth < other.depth and self.begin <= other.begin < self.end


@dataclass(frozen=True)
class Code:
    """What the compiler wrote down of a kernel."""

    tile_loops: tuple[Loop, ...]
    """The innermost loops that have matrix products: over tiles of keys. Quire's kernel has one for whole tiles, and others that mask."""
    row_bundles: int
    """Of the loop around them, themselves not counted."""
    units: dict[str, float]
    """Of the loop over whole tiles: how much of each functional unit is used, and the share of bundles with scalars alone or nothing."""

    @property
    def whole(self) -> Loop:
        """The loop over whole tiles."""
        return min(self.tile_loops, key=lambda loop: loop.bundles)

    @property
    def masked(self) -> Loop:
        """The loop over tiles at a row's ends."""
        return max(self.tile_loops, key=lambda loop: loop.bundles)


def loops_of(bundles: str) -> list[Loop]:
    """Every loop of a listing of final bundles. Bundles are marked with `LB` where a loop begins, and with one `>` per loop they are in."""
    found: list[Loop] = []
    inside: list[list[int]] = []  # begin, depth and matrix products of the loops that the bundle is in

    def close(depth: int, end: int) -> None:
        while inside and inside[-1][1] > depth:
            begin, at, products = inside.pop()
            found.append(Loop(begin, end, at, products))

    last = 0
    for match in _BUNDLE.finditer(bundles):
        address, depth = int(match[1], 16), len(match[3])
        begins = "LB" in match[2]
        close(depth - begins, address)
        if begins:
            inside.append([address, depth, 0])
        for loop in inside:
            loop[2] += match[4].count(_MATRIX_PRODUCT)
        last = address
    close(-1, last + 1)
    return sorted(found, key=lambda loop: loop.begin)


def read_code(folder: Path) -> Code:
    """The kernel among what was dumped into a folder: the program that has matrix products in a loop."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        loops = [loop for loop in loops_of(path.read_text(encoding="utf-8", errors="replace")) if loop.num_products]
        innermost = [loop for loop in loops if not any(loop.contains(other) for other in loops)]
        if innermost:
            around = [loop for loop in loops if loop.contains(innermost[0])]
            row_bundles = around[-1].bundles - sum(loop.bundles for loop in innermost) if around else 0
            code = Code(tuple(innermost), row_bundles, {})
            stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
            tables = [p for p in folder.iterdir() if p.name.startswith(stem) and "per-bundle-utilization" in p.name]
            return replace(code, units=units_of(tables[0].read_text(encoding="utf-8"), code.whole)) if tables else code
    raise ValueError(f"the compiler wrote no loop with matrix products into {folder}")


def units_of(table: str, loop: Loop) -> dict[str, float]:
    """Shares of the functional units that a loop's bundles use."""
    head = _UNITS.search(table)
    assert head is not None, "the compiler's table of units begins with their names and numbers"
    names = [name.strip() for name in head[1].split(",")]
    numbers = [int(number) for number in head[2].split()]
    rows = [[int(cell) for cell in line.split()] for line in table[head.end() :].splitlines() if line[:1].isdigit()]
    own = rows[loop.begin : loop.end]
    shares = {
        name: round(sum(row[idx] for row in own) / (numbers[idx] * len(own)), 3) for idx, name in enumerate(names)
    }
    scalar = names.index("SALU")
    shares["scalar only"] = round(sum(any(row) and sum(row) == row[scalar] for row in own) / len(own), 3)
    shares["nothing"] = round(sum(not any(row) for row in own) / len(own), 3)
    return shares


def read_static_cycles(folder: Path) -> dict[str, int]:
    """The compiler's own estimates, by instruction of the program; of a kernel it does not know how often its loops run."""
    found = {}
    for path in folder.glob("*_static_llo_profile.textproto"):
        text = path.read_text(encoding="utf-8")
        name, cycles = re.search(r'hlo_op_name: "([^"]+)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if name and cycles:
            found[name[1]] = int(cycles[1])
    return found


def figures(kernel: str, shape: KernelShape, chip: Chip, code: Code) -> dict[str, float]:
    """Everything that follows from the code, the shape and the chip; see the top of this file."""
    assert chip.clock_ghz is not None
    # jax's paged kernel has one head in its loop, its ragged one as many queries as a block has.
    repeats = shape.num_kv_heads if kernel == PAGED else 1
    if kernel == RAGGED:
        repeats = -(-shape.width // ragged_queries(shape))
    num_tiles = -(-shape.context // KEYS_PER_TILE)
    num_whole = (shape.context - shape.width + 1) // KEYS_PER_TILE if kernel == OURS else num_tiles
    per_tile = repeats * code.whole.bundles
    per_row = num_whole * per_tile + (num_tiles - num_whole) * repeats * code.masked.bundles
    if kernel == OURS:  # of jax's only the loops are counted, which is in their favour
        per_row += code.row_bundles
    compute_us = shape.rows * per_row / chip.clock_ghz / 1e3
    bound_us = shape.kv_bytes / chip.hbm_gb_per_s / 1e3
    first_copy_us, last_work_us = bound_us / (shape.rows * num_tiles), per_tile / chip.clock_ghz / 1e3
    estimate_us = first_copy_us + max(bound_us - first_copy_us, compute_us - last_work_us) + last_work_us
    return {
        "bundles_per_512_keys": per_tile * 512 / KEYS_PER_TILE,
        "compute_us": round(compute_us, 2),
        "bound_us": round(bound_us, 2),
        "estimate_us": round(estimate_us, 2),
        "estimate_over_bound": round(estimate_us / bound_us, 3),
    }


def measure(kernel: str, shape: KernelShape, chip: Chip) -> dict[str, Any]:
    """One row: compiles the kernel, and reads what was written down."""
    row: dict[str, Any] = {"benchmark": "kernels", "target": chip.name, "kernel": kernel, "shape": asdict(shape)}
    with tempfile.TemporaryDirectory(prefix="quire-kernels-") as name:
        folder = Path(name)
        answer = _compile(kernel, shape, chip, folder, with_profile=True)
        if answer is None:  # the profile aborts the compiler on some kernels
            answer = _compile(kernel, shape, chip, folder, with_profile=False)
        if answer is None:
            return {**row, "error": "the compiler's process ended without an answer"}
        if "error" in answer:
            return {**row, "error": answer["error"]}
        code, cycles = read_code(folder), read_static_cycles(folder)
    around = sum(value for name, value in cycles.items() if "attention" not in name)
    kernels = [value for name, value in cycles.items() if "attention" in name]
    assert chip.clock_ghz is not None
    return {
        **row,
        "compile_seconds": answer["seconds"],
        **figures(kernel, shape, chip, code),
        "around_us": round(around / chip.clock_ghz / 1e3, 2),
        "static_cycles": kernels[0] if kernels else None,
        "row_bundles": code.row_bundles,
        "masked_tile_bundles": code.masked.bundles,
        "units": code.units,
    }


def _compile(kernel: str, shape: KernelShape, chip: Chip, folder: Path, *, with_profile: bool) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "quire.bench.kernel_programs", "--dump-to", str(folder)]
    done = subprocess.run(
        command + ["--profile"] * with_profile,
        input=job(chip.name, kernel, shape),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def compare(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with the ratio of each one's bundles to those of jax's ragged kernel on the same shape."""
    ragged = {row["shape"]["name"]: row.get("bundles_per_512_keys") for row in rows if row["kernel"] == RAGGED}
    for row in rows:
        base, own = ragged.get(row["shape"]["name"]), row.get("bundles_per_512_keys")
        yield {**row, "bundles_over_ragged": round(own / base, 3) if own and base else None}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures side by side, for people."""
    columns = (
        "bundles_per_512_keys",
        "bundles_over_ragged",
        "compute_us",
        "bound_us",
        "estimate_over_bound",
        "around_us",
    )
    heads = ("bundles", "/ ragged", "compute µs", "bound µs", "est./bound", "around µs")
    lines = [f"{'shape':24}{'kernel':28}" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        cells = "".join(f"{'-' if row.get(column) is None else row[column]:>12}" for column in columns)
        if "error" in row:
            cells = f"  refused: {row['error'].splitlines()[0][:70]}"
        lines.append(f"{row['shape']['name']:24}{row['kernel']:28}{cells}")
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "kernels",
        help="what the TPU compiler makes of the attention kernels, beside jax's; what NKI ones cost by the emulator's count",
    )
    targets = [name for name, chip in chips().items() if chip.clock_ghz is not None]
    parser.add_argument(
        "--target",
        choices=[*targets, *nki_kernels.TARGETS],
        default=targets[0],
        help=f"a TPU chip, or a generation of NeuronCore (default: {targets[0]})",
    )
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="those that begin so; all unless given")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Compiles, or emulates, every kernel on every shape, prints the lines, then the table."""
    wanted = tuple(namespace.shapes) if namespace.shapes else ("",)
    if namespace.target in nki_kernels.TARGETS:
        return nki_kernels.run(namespace.target, wanted)
    chip = chips()[namespace.target]
    work = [(kernel, shape) for shape in SHAPES if shape.name.startswith(wanted) for kernel in KERNELS]
    with ThreadPoolExecutor(namespace.jobs) as pool:
        measured = pool.map(lambda each: measure(each[0], each[1], chip), work)
        rows = list(tqdm(measured, total=len(work), disable=not sys.stderr.isatty(), leave=False))
    rows = list(compare(rows))
    for row in rows:
        print(json.dumps(row))
    print(table(rows), file=sys.stderr)
    return 0
