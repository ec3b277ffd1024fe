"""The one place where the process's environment is read."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from quire.kernels.errors import BackendError


def cache_folder() -> Path:
    """Where compiled programs are kept: $QUIRE_CACHE, else quire/ in $XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get("QUIRE_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quire"


def cgroup_memory_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process's control group may still use, None without a limit (v2, then v1; man cgroups(7)).

    Pages of files that can be dropped at any time count as free.
    """
    for folder, limit, usage, inactive in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file():
            text = (folder / limit).read_text().strip()
            # v1 spells "no limit" as a number near 2^63.
            if text != "max" and int(text) < 1 << 60:
                used = int((folder / usage).read_text()) if (folder / usage).is_file() else 0
                droppable = _statistics(folder / "memory.stat").get(inactive, 0)
                return max(int(text) - max(used - droppable, 0), 0)
    return None


def _statistics(path: Path) -> dict[str, int]:
    """`name number` lines; empty where there is no such file."""
    if not path.is_file():
        return {}
    return {name: int(number) for name, number in (line.split() for line in path.read_text().splitlines())}


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory that can still be used: the kernel's estimate, capped by what its control group has left."""
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:  # not Linux: half of what is installed
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    left = cgroup_memory_left()
    return free if left is None else min(free, left)


def available_processors(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may keep busy: those it may run on, capped by its control group's quota, rounded up.

    The host's count is no measure in a container: more threads than the quota has room for are stopped in the middle of their work.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Processors' worth of time that the control group grants, None without a limit (v2, then v1)."""
    if (root / "cpu.max").is_file():
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    old = root / "cpu" / "cpu.cfs_quota_us"
    if old.is_file() and int(old.read_text()) > 0:
        return int(old.read_text()) / int((root / "cpu" / "cpu.cfs_period_us").read_text())
    return None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction-set flags of the first processor, as Linux names them; empty where there is no such file."""
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


# What Google's devices on the PCI bus are: TPUs from v2 to 7x, and not its network cards.
_GOOGLE_VENDOR = "0x1ae0"
_TPU_DEVICES = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})


def has_tpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this host has TPU chips."""
    if not devices.is_dir():
        return False
    return any(
        (folder / "vendor").read_text().strip() == _GOOGLE_VENDOR
        and (folder / "device").read_text().strip() in _TPU_DEVICES
        for folder in devices.iterdir()
        if (folder / "vendor").is_file()
    )


def prepare_tpu_compiler() -> None:
    """Has libtpu compile without looking for chips, and in several processes at once; to be called before it is loaded.

    What the user has set stays.
    """
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def dump_tpu_code(folder: Path, *, with_profile: bool) -> None:
    """Has libtpu write the final code of what it compiles into a folder, and its estimates of cycles; to be called before it is loaded."""
    flags = [
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final.*",
    ]
    if with_profile:
        flags.append(f"--xla_jf_dump_static_llo_profile_to={folder}")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip()


def neuron_devices(devices: Path = Path("/dev")) -> int:
    """How many Neuron chips the driver shows on this host."""
    return sum(1 for entry in devices.glob("neuron*") if entry.name.removeprefix("neuron").isdigit())


def neuron_target(product: Path = Path("/sys/devices/virtual/dmi/id/product_name")) -> str | None:
    """What neuronx-cc calls this host's chips: as $NEURON_PLATFORM_TARGET_OVERRIDE says, else by the instance's type.

    None where neither tells.
    """
    if explicit := os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE"):
        return explicit
    family = product.read_text().partition(".")[0].strip() if product.is_file() else ""
    # trn1n, trn2u and the like carry the same chips.
    return next((name for name in ("inf2", "trn1", "trn2", "trn3") if family.startswith(name)), None)


def prepare_neuron(num_cores: int, logical_cores: int | None) -> None:
    """Settles the Neuron runtime's and compiler's settings; to be called before jax or torch looks for devices.

    What the user has set stays.
    `num_cores` are the logical ones to take, so that the others are left to other processes; `logical_cores` is how many physical cores
    make one, None for the runtime's default.
    """
    settings = {
        # Rounding to nearest even: the same tokens from the same inputs.
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0",
        # One step runs while the next is launched; nothing of it if launching waited.
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "3",
        # Otherwise every conversion while weights are loaded would be compiled for the device, for seconds each.
        "NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU": "1",
        "NEURON_COMPILE_CACHE_URL": str(cache_folder() / "neuron"),
        # For programs run through torch-neuronx: as many sets of weights as one program runs with.
        "NEURON_RT_IO_RING_CACHE_SIZE": "1",
    }
    if "NEURON_RT_VISIBLE_CORES" not in os.environ:
        settings["NEURON_RT_NUM_CORES"] = str(num_cores)
    if logical_cores is not None:
        settings["NEURON_LOGICAL_NC_CONFIG"] = str(logical_cores)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def neuron_facts(driver: Path = Path("/sys/module/neuron/version")) -> dict[str, str]:
    """What the host says of its Neuron chips, for a report: the driver, the instance, the tools, and every setting."""
    facts = {
        "chips": str(neuron_devices()),
        "compile target": neuron_target() or "not told by the host",
        "driver": driver.read_text().strip() if driver.is_file() else "not loaded",
        "compiler on the path": shutil.which("neuronx-cc") or "none",
        "neuron-ls on the path": shutil.which("neuron-ls") or "none",
    }
    return facts | {name: value for name, value in sorted(os.environ.items()) if name.startswith("NEURON")}


def neuron_logical_cores() -> int | None:
    """Physical cores in a logical one as $NEURON_LOGICAL_NC_CONFIG says; None where it does not. Raises BackendError for no number."""
    text = os.environ.get("NEURON_LOGICAL_NC_CONFIG")
    if text is None:
        return None
    if text not in ("1", "2"):
        raise BackendError(f"NEURON_LOGICAL_NC_CONFIG={text!r} is neither 1 nor 2")
    return int(text)


def neuron_cache() -> str:
    """Where what neuronx-cc made is kept: the folder or s3:// address of $NEURON_COMPILE_CACHE_URL, else one of quire's."""
    return os.environ.get("NEURON_COMPILE_CACHE_URL", str(cache_folder() / "neuron"))


def neuron_flags() -> list[str]:
    """Flags for neuronx-cc that the user has set: $NEURON_CC_FLAGS."""
    return shlex.split(os.environ.get("NEURON_CC_FLAGS", ""))


def set_neuron_flags(flags: Sequence[str]) -> None:
    """Replaces $NEURON_CC_FLAGS, which the Neuron plugin reads at each compilation."""
    os.environ["NEURON_CC_FLAGS"] = shlex.join(flags)


def api_keys() -> tuple[str, ...]:
    """Keys that requests to a server must bear: $QUIRE_API_KEYS, separated by commas."""
    return _listed("QUIRE_API_KEYS")


def admin_keys() -> tuple[str, ...]:
    """Keys that open a server's admin endpoints: $QUIRE_ADMIN_KEYS, separated by commas."""
    return _listed("QUIRE_ADMIN_KEYS")


def _listed(name: str) -> tuple[str, ...]:
    return tuple(key for part in os.environ.get(name, "").split(",") if (key := part.strip()))
