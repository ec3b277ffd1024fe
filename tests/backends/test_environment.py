"""What the machine says of itself is read right, also in a container and on other systems."""

import os
from pathlib import Path

import pytest

from quire.backends.environment import (
    available_memory,
    available_processors,
    cache_folder,
    cgroup_memory_left,
    cpu_flags,
)

MEMINFO = "MemTotal:       24683120 kB\nMemFree:         1000 kB\nMemAvailable:   8388608 kB\n"


def test_the_control_groups_limit_is_read_in_both_versions(tmp_path: Path) -> None:
    assert cgroup_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert cgroup_memory_left(tmp_path) == 2**31
    old = tmp_path / "v1"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_memory_left(old) is None
    (old / "memory" / "memory.limit_in_bytes").write_text("1048576")
    assert cgroup_memory_left(old) == 2**20


def test_what_the_control_group_uses_is_not_free_but_dropped_files_are(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("7000\n")
    assert cgroup_memory_left(tmp_path) == 1000
    (tmp_path / "memory.stat").write_text("anon 6000\ninactive_file 500\n")
    assert cgroup_memory_left(tmp_path) == 1500


def test_available_memory_is_the_kernels_estimate_under_the_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    left = cgroup_memory_left()
    assert abs(available_memory(meminfo) - min(8 * 2**30, 8 * 2**30 if left is None else left)) < 2**28
    assert available_memory(tmp_path / "none") > 0


def test_processor_flags_are_read_on_x86_and_arm(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "avx512_bf16"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert "asimd" in cpu_flags(cpuinfo)
    assert cpu_flags(tmp_path / "none") == frozenset()


def test_processors_are_those_that_the_control_group_grants(tmp_path: Path) -> None:
    usable = available_processors(tmp_path)
    assert usable == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_processors(tmp_path) == usable
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert available_processors(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert available_processors(tmp_path) == min(2, usable)
    old = tmp_path / "v1" / "cpu"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert available_processors(old.parent) == usable
    (old / "cpu.cfs_quota_us").write_text("100000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert available_processors(old.parent) == 1


def test_the_cache_folder_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("QUIRE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "quire"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quire"
