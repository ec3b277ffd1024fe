"""How busy the machine is with other work, and waiting until it is not. Reads /proc; elsewhere nothing is known and nobody waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
WINDOW_SECONDS = 2.0
# Fields of a process's stat file after its name, counted from its state (man proc(5)).
_PARENT, _UTIME, _CSTIME = 1, 11, 14


@dataclass(frozen=True)
class Reading:
    """Clock ticks since boot: of all processors, spent busy, and spent by this process and what it started."""

    total: int
    busy: int
    own: int

    def other_load(self, earlier: Reading) -> float:
        """The share of all processors that others kept busy since `earlier`; time stolen by a host counts as others'."""
        total = self.total - earlier.total
        other = (self.busy - earlier.busy) - (self.own - earlier.own)
        return min(max(other / total, 0.0), 1.0) if total > 0 else 0.0


@dataclass(frozen=True)
class Quiet:
    """How waiting ended: seconds waited, the last load seen, and whether that was quiet enough."""

    seconds: float
    other_load: float | None
    is_quiet: bool


class LoadMeter:
    """Reads how busy processors are. `pid` and its descendants, living or waited for, are own work; all else is others'."""

    def __init__(self, proc: Path = PROC, pid: int | None = None) -> None:
        self._proc = proc
        self._pid = pid or os.getpid()

    def read(self) -> Reading | None:
        """Now; None where there is no /proc/stat."""
        path = self._proc / "stat"
        if not path.is_file():
            return None
        # user nice system idle iowait irq softirq steal; guests are in user already.
        ticks = [int(number) for number in path.read_text().split("\n", 1)[0].split()[1:9]]
        return Reading(sum(ticks), sum(ticks) - ticks[3] - ticks[4], self._own_ticks())

    def _own_ticks(self) -> int:
        stats = process_stats(self._proc)
        return sum(sum(map(int, stats[pid][_UTIME : _CSTIME + 1])) for pid in tree(self._pid, stats))

    def wait_until_quiet(
        self,
        threshold: float,
        limit: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        waiting: Callable[[float], None] = lambda load: None,
    ) -> Quiet:
        """Returns once others kept less than `threshold` of the processors busy for a window of time, or after `limit` seconds.

        `waiting(load)` is called after each window that was not quiet.
        """
        begin = clock()
        earlier = self.read()
        if earlier is None or limit <= 0:
            return Quiet(0.0, None, is_quiet=False)
        while True:
            sleep(WINDOW_SECONDS)
            now = self.read()
            assert now is not None
            load = now.other_load(earlier)
            if load < threshold or clock() - begin >= limit:
                return Quiet(clock() - begin, load, load < threshold)
            waiting(load)
            earlier = now


def process_stats(proc: Path = PROC) -> dict[int, list[str]]:
    """The stat file of each process, from its state on."""
    found = {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            # The name may hold spaces and brackets; the last bracket ends it.
            found[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def tree(root: int, stats: dict[int, list[str]]) -> list[int]:
    """A process and its descendants, of those that live."""
    children: dict[int, list[int]] = {}
    for pid, fields in stats.items():
        children.setdefault(int(fields[_PARENT]), []).append(pid)
    found = [root] if root in stats else []
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found


def peak_memory(root: int, proc: Path = PROC) -> int | None:
    """Bytes of memory (VmHWM) at their highest, of a process and its living descendants added up; None where unknown.

    Pages that several of them share count in each.
    """
    total = 0
    for pid in tree(root, process_stats(proc)):
        try:
            lines = (proc / str(pid) / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total or None
