"""Which backend a device name stands for."""

from __future__ import annotations

from quire.backends.base import Backend
from quire.backends.cpu import CpuBackend
from quire.kernels.errors import BackendError

DEVICES = ("auto", "cpu", "tpu", "neuron", "simulated")


def select_backend(device: str) -> Backend:
    """The backend for one of DEVICES. Raises BackendError with the reason when it cannot be had.

    "auto" is the CPU as long as it is the only backend there is.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"device {device!r} cannot be used: {reason}")
    return CpuBackend()


def unavailable_reason(device: str) -> str | None:
    """Why a device of DEVICES cannot be used here, None when it can."""
    if device in ("auto", "cpu"):
        return None
    return "this version of quire has no backend for it yet; use --device cpu"
