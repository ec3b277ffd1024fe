"""The engine core: schedule, execute, update. Token ids in, token ids out; no text, no HTTP."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from quire.backends.base import Backend, Capabilities, ShapeLimits
from quire.backends.environment import cache_folder
from quire.backends.select import select_backend
from quire.engine.admission import AdmissionPolicy, make_admission_policy
from quire.engine.config import (
    EngineConfig,
    LiveSettings,
    ResolvedConfig,
    resolve,
    resolve_block_size,
    resolve_dtype,
)
from quire.engine.device_state import cache_block_bytes
from quire.engine.kv_cache_manager import KVCacheManager
from quire.engine.metrics import EngineStats, IdleClock, StepSeconds
from quire.engine.model_runner import Dispatched, ModelRunner, RunnerConfig
from quire.engine.request import EngineCoreRequest
from quire.engine.scheduler import Scheduler
from quire.engine.step import StepConfig
from quire.engine.step_data import EngineCoreOutput
from quire.kernels.errors import EngineDeadError, InvalidConfigError
from quire.kernels.ops import REFERENCE, Ops
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import load_params, resolve_model
from quire.models.config import ModelConfig
from quire.models.params import ParamSpec, as_array, init_params
from quire.models.registry import load_config

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]
"""Called as (phase, done, total, what) while weights are loaded and shapes are compiled."""


@dataclass(frozen=True)
class LoadedModel:
    """Where a model lies and what it is."""

    folder: Path
    config: ModelConfig


class EngineCore:
    """One model on one backend, with the scheduler that feeds it.

    `step` is the definition of the engine. With asynchronous scheduling one step is always in flight while the next is
    scheduled; without, each is read before the next is made. An error inside a step ends the engine: every later request and step
    raises EngineDeadError with the cause.
    """

    def __init__(
        self, config: EngineConfig, progress: Progress = lambda *_: None, backend: Backend | None = None
    ) -> None:
        """Loads the model and compiles every shape. Raises InvalidConfigError, ModelError or BackendError with the remedy.

        `backend` takes the place of the one that `config.device` names.
        """
        begin = time.perf_counter()
        backend = backend or select_backend(config.device.device)
        self._backend = backend
        backend.make_mesh(config.device.tensor_parallel_size)
        if config.device.compilation_cache:
            _enable_compilation_cache()
        folder = resolve_model(config.model.model)
        self.model = LoadedModel(folder, load_config(folder, config.model.max_model_len))
        _resolve(
            config, self.model.config, backend
        )  # settings that cannot work are refused before the weights are read
        ops = _choose_ops(config, self.model.config, backend)
        params = _load(config, self.model, backend, ops, progress)
        self.config = _resolve(config, self.model.config, backend)
        for note in self.config.notes:
            logger.info("%s", note)
        self.settings = LiveSettings.of(config.scheduler, self.config)
        self.scheduler = _make_scheduler(config, self.config)
        self.runner = _make_runner(config, self.config, self.model.config, backend, ops, params)
        self._max_in_flight = 1 if config.scheduler.async_scheduling else 0
        self._in_flight: deque[Dispatched] = deque()
        self._dead: BaseException | None = None
        self.seconds = StepSeconds()
        self._idle = IdleClock()
        warm_up_seconds = self.runner.warm_up(lambda done, total, what: progress("compile", done, total, what))
        self.ready_seconds = time.perf_counter() - begin
        logger.info("ready after %.1f s, %.1f s of it compiling", self.ready_seconds, warm_up_seconds)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queues a request. Raises what `Scheduler.add_request` raises; nothing else is affected by a refused one."""
        self._check_alive()
        self.scheduler.add_request(request)

    def abort_request(self, request_id: str, *, has_finished: bool = False) -> bool:
        """Ends a request at once; False when it is unknown, has finished, or the engine has stopped.

        `has_finished` when it came to its end in a way that only its caller can see, at a stop string.
        """
        if self._dead is not None:
            return False
        return self.scheduler.abort_request(request_id, has_finished=has_finished)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to wait for."""
        return self.scheduler.has_unfinished_requests or bool(self._in_flight)

    @property
    def is_busy(self) -> bool:
        """Whether a request runs or a step is in flight; with work but not busy, requests wait for a batching window."""
        return bool(self.scheduler.running) or bool(self._in_flight)

    def step(self) -> list[EngineCoreOutput]:
        """Launches the next step, and gives what the one before it brought."""
        self._check_alive()
        try:
            with self.runner.compilations.counting():
                return self._step()
        except BaseException as error:
            # An interrupt too: it may have struck between a step's scheduling and its launch, and what was scheduled counts as computed.
            self._dead = error
            raise

    def _step(self) -> list[EngineCoreOutput]:
        with self.seconds.measure("schedule"):
            scheduled = self.scheduler.schedule()
        if scheduled is not None:
            with self.seconds.measure("launch"):
                self._idle.launched()
                self._in_flight.append(self.runner.execute(scheduled))
        if not self._in_flight or (scheduled is not None and len(self._in_flight) <= self._max_in_flight):
            return []
        dispatched = self._in_flight.popleft()
        with self.seconds.measure("wait"):
            self.runner.wait(dispatched)
        if not self._in_flight:
            self._idle.drained()
        with self.seconds.measure("update"):
            return self.scheduler.update_from_output(dispatched.step, self.runner.read(dispatched))

    def configure(self, changes: Mapping[str, object]) -> LiveSettings:
        """Changes scheduler settings while serving; requests already queued keep their place. Returns what holds now.

        Raises InvalidConfigError, and changes nothing, for an unknown setting or a value that the compiled shapes cannot serve.
        """
        settings = self.settings.changed(changes, self.config)
        if settings != self.settings:
            self.scheduler.reconfigure(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                priority_seconds=settings.effective_priority_seconds,
            )
        if (settings.batching, settings.batching_window, settings.max_num_seqs) != (
            self.settings.batching,
            self.settings.batching_window,
            self.settings.max_num_seqs,
        ):
            self.scheduler.set_admission_policy(_admission(settings))
        self.settings = settings
        return settings

    @property
    def capabilities(self) -> Capabilities:
        """What the device can do."""
        return self._backend.capabilities

    def profile(self, folder: Path) -> AbstractContextManager[object]:
        """Records what the device does inside the context, into `folder`, for the backend's profile viewer."""
        return self._backend.profile(folder)

    def stats(self) -> EngineStats:
        """A reading of every gauge and counter."""
        return EngineStats.read(self.scheduler, self.runner, self.seconds, self._idle)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(
                f"the engine stopped after an error ({self._dead!r}); start a new one"
            ) from self._dead


def _enable_compilation_cache() -> None:
    """Points jax's persistent cache at quire's folder, unless the process has chosen one itself."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _choose_ops(config: EngineConfig, model: ModelConfig, backend: Backend) -> Ops:
    block_size = resolve_block_size(config, backend.capabilities)
    dtype = resolve_dtype(config, model, backend.capabilities)
    ops = backend.select_ops(model, dtype, block_size, _wanted_kernels(config.device.kernels))
    logger.info("kernels: %s", ops.describe().replace("\n", ", "))
    return ops


def _load(config: EngineConfig, model: LoadedModel, backend: Backend, ops: Ops, progress: Progress) -> object:
    dtype = jax.numpy.dtype(resolve_dtype(config, model.config, backend.capabilities))
    stacked = backend.capabilities.scan_layers

    quantization = config.model.quantization

    def place(spec: ParamSpec, array: np.ndarray) -> object:
        if not spec.is_product_weight(model.config):
            return as_array(spec, array)
        if spec.name != "embed_tokens":
            # Which expert a token goes to hangs on small differences.
            return ops.linear.function(array, "none" if spec.key == "router" else quantization)
        if ops.linear.name == REFERENCE and quantization == "none":
            return as_array(spec, array)  # rows are read out of it as well
        return ops.linear.function(array.T, quantization)  # [V, D] in the checkpoint

    if config.model.load_format == "dummy":
        return init_params(model.config, config.model.seed, dtype, stacked=stacked, place=place)
    return load_params(
        model.folder,
        model.config,
        dtype,
        stacked=stacked,
        place=place,
        progress=lambda done, total: progress("load", done, total, "tensors"),
    )


def _resolve(config: EngineConfig, model: ModelConfig, backend: Backend) -> ResolvedConfig:
    block_size = resolve_block_size(config, backend.capabilities)
    dtype = resolve_dtype(config, model, backend.capabilities)
    return resolve(
        config,
        model,
        backend.capabilities,
        cache_bytes=backend.kv_cache_bytes(config.cache.memory_utilization),
        block_bytes=cache_block_bytes(model, block_size, dtype),
        block_size=block_size,
    )


def _admission(settings: LiveSettings) -> AdmissionPolicy:
    return make_admission_policy(
        settings.batching, window_seconds=settings.batching_window, max_num_seqs=settings.max_num_seqs
    )


def _make_scheduler(config: EngineConfig, resolved: ResolvedConfig) -> Scheduler:
    settings = LiveSettings.of(config.scheduler, resolved)
    return Scheduler(
        KVCacheManager(
            resolved.num_kv_blocks,
            resolved.block_size,
            enable_prefix_caching=resolved.enable_prefix_caching,
            sliding_window=resolved.sliding_window,
        ),
        resolved.limits,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        admission=_admission(settings),
        decode_steps_per_dispatch=config.scheduler.decode_steps_per_dispatch,
        priority_seconds=settings.effective_priority_seconds,
    )


def _make_runner(
    config: EngineConfig, resolved: ResolvedConfig, model: ModelConfig, backend: Backend, ops: Ops, params: object
) -> ModelRunner:
    shapes = backend.step_shapes(
        ShapeLimits(
            max_num_seqs=resolved.max_num_seqs,
            max_prefill_tiles=resolved.limits.max_prefill_tiles,
            max_model_len=resolved.max_model_len,
            block_size=resolved.block_size,
            decode_steps_per_dispatch=config.scheduler.decode_steps_per_dispatch,
            is_padding_free=ops.is_padding_free,
            is_random_free=ops.is_random_free,
            most_sampling=SamplingMode[config.device.sampling.upper()],
        )
    )
    return ModelRunner(
        model,
        params,
        backend,
        StepConfig(
            model, ops, resolved.block_size, resolved.max_logprobs, unroll_steps=not backend.capabilities.scan_layers
        ),
        RunnerConfig(
            max_num_seqs=resolved.max_num_seqs,
            max_model_len=resolved.max_model_len,
            num_kv_blocks=resolved.num_kv_blocks,
            block_size=resolved.block_size,
            dtype=resolved.dtype,
        ),
        resolved.limits,
        shapes,
    )


def _wanted_kernels(text: str | None) -> dict[str, str]:
    """`op=name,op=name` as a dict. Raises InvalidConfigError for anything else."""
    if not text:
        return {}
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise InvalidConfigError(f"kernels={text!r} is not of the form op=name,op=name")
    wanted = {op.strip(): name.strip() for op, name in pairs}
    if len(wanted) != len(pairs):
        raise InvalidConfigError(f"kernels={text!r} names an op twice")
    return wanted
