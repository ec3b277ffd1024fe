"""Telling others' load from one's own, on a made-up /proc."""

from pathlib import Path

import pytest

from quire.bench.peers.quiet import LoadMeter, Quiet, peak_memory


class FakeProc:
    """A machine of 100 ticks a second: `pid` 10 is ours, 11 its child, 12 its grandchild, 20 somebody else's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.user = self.idle = 0
        self.loads: list[float] = []
        for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
            self.set_process(pid, parent, 0)
        self.write()

    def set_process(self, pid: int, parent: int, ticks: int, waited_for: int = 0) -> None:
        folder = self.folder / str(pid)
        folder.mkdir(exist_ok=True)
        fields = ["S", parent, *[0] * 9, ticks, 0, waited_for, 0, *[0] * 30]
        (folder / "stat").write_text(f"{pid} (a ) (name) {' '.join(map(str, fields))}\n")
        (folder / "status").write_text(f"Name:\tx\nVmPeak:\t99 kB\nVmHWM:\t{pid} kB\n")

    def write(self) -> None:
        # user nice system idle iowait irq softirq steal guest guest_nice
        (self.folder / "stat").write_text(f"cpu  {self.user} 0 0 {self.idle} 0 0 0 0 0 0\ncpu0 1 2 3\n")

    def pass_time(self, seconds: float, load: float) -> None:
        self.now += seconds
        self.user += round(100 * seconds * load)
        self.idle += round(100 * seconds * (1 - load))
        self.write()

    def sleep(self, seconds: float) -> None:
        """Time passes with the next of `loads`, the last of them for ever."""
        load = self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]
        self.pass_time(seconds, load)

    def wait(self, threshold: float, limit: float) -> tuple[Quiet, list[float]]:
        heard: list[float] = []
        meter = LoadMeter(self.folder, 10)
        return meter.wait_until_quiet(threshold, limit, self.sleep, lambda: self.now, heard.append), heard


@pytest.fixture
def proc(tmp_path) -> FakeProc:
    return FakeProc(tmp_path)


def test_what_a_process_and_its_descendants_use_is_not_others_load(proc):
    meter = LoadMeter(proc.folder, 10)
    before = meter.read()
    proc.pass_time(10, 0.8)  # 800 ticks: 100 here, 200 in a child, 300 in its child, 200 of others
    for pid, parent, ticks in ((10, 1, 100), (11, 10, 200), (12, 11, 300), (20, 1, 200)):
        proc.set_process(pid, parent, ticks)
    assert meter.read().other_load(before) == pytest.approx(0.2)


def test_a_child_that_has_ended_still_counts(proc):
    meter = LoadMeter(proc.folder, 10)
    before = meter.read()
    proc.pass_time(10, 0.5)
    (proc.folder / "12" / "stat").unlink()
    proc.set_process(11, 10, 100, waited_for=400)
    assert meter.read().other_load(before) == 0.0


def test_waiting_ends_with_the_first_quiet_window(proc):
    proc.loads = [0.9, 0.5, 0.01]
    quiet, heard = proc.wait(threshold=0.05, limit=60)
    assert quiet == Quiet(6.0, pytest.approx(0.01), is_quiet=True)
    assert heard == [pytest.approx(0.9), pytest.approx(0.5)]


def test_waiting_has_an_end_and_says_that_it_was_not_quiet(proc):
    proc.loads = [0.7]
    quiet, _ = proc.wait(threshold=0.05, limit=7)
    assert quiet == Quiet(8.0, pytest.approx(0.7), is_quiet=False)


def test_nobody_waits_without_a_limit_or_without_proc(proc, tmp_path):
    assert proc.wait(threshold=0.05, limit=0)[0] == Quiet(0.0, None, is_quiet=False)
    assert LoadMeter(tmp_path / "nowhere").wait_until_quiet(0.05, 60) == Quiet(0.0, None, is_quiet=False)


def test_memory_is_that_of_the_process_and_what_it_has_started(proc):
    assert peak_memory(11, proc.folder) == (11 + 12) * 1024
    assert peak_memory(77, proc.folder) is None


def test_the_real_machine_can_be_read():
    meter = LoadMeter()
    before = meter.read()
    sum(range(3_000_000))
    load = meter.read().other_load(before)
    assert 0.0 <= load <= 1.0
