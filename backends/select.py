"""Which backend a device name stands for."""

from __future__ import annotations

import importlib.util

import jax

from quire.backends.base import Backend
from quire.backends.cpu import CpuBackend
from quire.backends.environment import has_tpu
from quire.backends.tpu import TpuBackend
from quire.kernels.errors import BackendError

DEVICES = ("auto", "cpu", "tpu", "neuron", "simulated")


def select_backend(device: str) -> Backend:
    """The backend for one of DEVICES. Raises BackendError with the reason when it cannot be had.

    "auto" is the TPU where this host has one, else the CPU.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"device {device!r} cannot be used: {reason}")
    if device == "tpu" or (device == "auto" and has_tpu()):
        return TpuBackend()
    # Otherwise jax would try every platform that it has a package for, and complain of those that are not there.
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    return CpuBackend()


def unavailable_reason(device: str) -> str | None:
    """Why a device of DEVICES cannot be used here, None when it can."""
    if device in ("auto", "cpu"):
        return None
    if device == "tpu":
        if not has_tpu():
            return "this host has no TPU chip on its PCI bus"
        if importlib.util.find_spec("libtpu") is None:
            return "libtpu is not installed; pip install 'quire[tpu]'"
        return None
    return "this version of quire has no backend for it yet; use --device cpu"
