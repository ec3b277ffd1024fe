"""Which backend a device name stands for."""

from __future__ import annotations

import importlib.util

import jax

from quire.backends.base import Backend
from quire.backends.cpu import CpuBackend
from quire.backends.environment import has_tpu, neuron_devices
from quire.backends.neuron import NeuronBackend, NeuronOptions, why_no_runtime
from quire.backends.simulated import SimulatedBackend
from quire.backends.tpu import TpuBackend
from quire.kernels.errors import BackendError

DEVICES = ("auto", "cpu", "tpu", "neuron", "simulated")
"""Behind "simulated" comes which chip, and how many: simulated:v6e:4."""


def select_backend(device: str, num_devices: int = 1, neuron: NeuronOptions | None = None) -> Backend:
    """The backend for one of DEVICES, of which `num_devices` will be used. Raises BackendError with the reason when it cannot be had.

    "auto" is the TPU or the NeuronCores where this host has them, else the CPU.
    """
    if device.partition(":")[0] not in DEVICES or (":" in device and not device.startswith("simulated:")):
        raise BackendError(f"device {device!r} is not one of {', '.join(DEVICES)}, as simulated:v6e:4")
    if device.startswith("simulated:"):
        return SimulatedBackend(device.removeprefix("simulated:"))
    neuron = neuron or NeuronOptions()
    if neuron.emulate is not None:
        if device not in ("auto", "neuron"):
            raise BackendError(
                f"emulate={neuron.emulate!r} stands for NeuronCores, and device {device!r} was asked for"
            )
        only_cpu()
        return NeuronBackend.emulated(neuron)
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"device {device!r} cannot be used: {reason}")
    if device == "tpu" or (device == "auto" and has_tpu()):
        return TpuBackend()
    if device == "neuron" or (device == "auto" and neuron_devices()):
        return NeuronBackend.attached(neuron, num_devices)
    only_cpu()
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
    if device == "neuron":
        if not neuron_devices():
            return "the Neuron driver shows no chip (/dev/neuron0); --emulate inf2 has the CPU behave like one"
        return why_no_runtime()
    return "it simulates a chip, and none was named, as simulated:v6e:4 does"


def only_cpu() -> None:
    """Has jax look for nothing but the CPU, unless the user has said otherwise.

    It would try every platform that it has a package for, and complain of those that are not there.
    """
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
