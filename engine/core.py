"""The engine core: schedule, execute, update. Token ids in, token ids out; no text, no HTTP."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from quire.backends.base import Backend, Capabilities
from quire.backends.environment import cache_folder
from quire.backends.neuron import NeuronOptions
from quire.backends.select import select_backend
from quire.backends.simulated import SimulatedBackend
from quire.engine.admission import AdmissionPolicy, make_admission_policy
from quire.engine.config import EngineConfig, LiveSettings, ResolvedConfig
from quire.engine.draft_controller import DraftController
from quire.engine.draft_scheduler import MAX_DRAFT_LAG, DraftScheduler, FixedDrafts
from quire.engine.drafting import Weights
from quire.engine.kv_cache_manager import KVCacheManager
from quire.engine.metrics import EngineStats, IdleClock, StepSeconds
from quire.engine.model_runner import Launched, ModelRunner, Runner
from quire.engine.planning import EnginePlan
from quire.engine.request import EngineCoreRequest
from quire.engine.scheduler import Scheduler
from quire.engine.simulation import Clock, RealClock, SimulatedRunner, Simulation
from quire.engine.step_data import EngineCoreOutput
from quire.kernels.errors import EngineDeadError, InvalidConfigError
from quire.models.config import ModelConfig

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]
"""Called as (phase, done, total, what) while weights are loaded and shapes are compiled."""


class EngineCore:
    """One model on one backend, with the scheduler that feeds it.

    `step` is the definition of the engine. With asynchronous scheduling one step is always in flight while the next is
    scheduled; without, each is read before the next is made. An error inside a step ends the engine: every later request and step
    raises EngineDeadError with the cause.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress = lambda *_: None,
        backend: Backend | None = None,
        clock: Clock | None = None,
        simulation: Simulation | None = None,
    ) -> None:
        """Loads the model and compiles every shape. Raises InvalidConfigError, ModelError or BackendError with the remedy.

        `backend` takes the place of the one that `config.device` names. `clock` may be a virtual one, and `simulation` says more, where
        the devices are simulated.
        """
        begin = time.perf_counter()
        backend = backend or _select_backend(config)
        self.clock = clock or RealClock()
        self.runner: Runner
        if isinstance(backend, SimulatedBackend):
            self.plan = EnginePlan.make(config, backend)
            self.runner = SimulatedRunner(self.plan, simulation or _simulation(config), self.clock)
        else:
            _refuse_simulation(config)
            if config.device.compilation_cache and not backend.capabilities.keeps_compiled:
                _enable_compilation_cache()
            # Settings that cannot work are refused before the weights are read; what is left once they are read decides on the cache.
            plan = EnginePlan.make(config, backend)
            weights = _load(plan, progress)
            self.plan = plan.after_loading()
            self.runner = ModelRunner(self.plan, weights)
        for note in self.config.notes:
            logger.info("%s", note)
        self.settings = LiveSettings.of(config.scheduler, self.config)
        self.scheduler = _make_scheduler(self.plan, self.clock)
        self._max_in_flight = 1 if config.scheduler.async_scheduling else 0
        self._in_flight: deque[Launched] = deque()
        self._dead: BaseException | None = None
        self.seconds = StepSeconds()
        self._idle = IdleClock(self.clock.now)
        self._last_done = 0.0
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
        return self._read_oldest()

    def drain(self) -> list[EngineCoreOutput]:
        """Waits for what is in flight, launching nothing, and gives what it brought: the device is idle then, whoever waits or runs.

        For those who give the machine to something else for a while; the next step goes on as if there had been no pause.
        """
        self._check_alive()
        outputs: list[EngineCoreOutput] = []
        try:
            while self._in_flight:
                outputs += self._read_oldest()
        except BaseException as error:
            self._dead = error
            raise
        return outputs

    def _read_oldest(self) -> list[EngineCoreOutput]:
        dispatched = self._in_flight.popleft()
        with self.seconds.measure("wait"):
            self.runner.wait(dispatched)
        seconds = self._seconds_of(dispatched)
        if not self._in_flight:
            self._idle.drained()
        with self.seconds.measure("update"):
            outputs = self.scheduler.update_from_output(dispatched.step, self.runner.read(dispatched))
        if self.scheduler.drafts is not None:
            self.scheduler.drafts.observe_step(dispatched.step, seconds, outputs)
        return outputs

    def _seconds_of(self, dispatched: Launched) -> float:
        """How long a step took that has just ended: from the end of the one before, or from its launch where the device was idle."""
        done = self.clock.now()
        begin = max(self._last_done, dispatched.launched_at)
        self._last_done = done
        return done - begin

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
    def model(self) -> ModelConfig:
        """What the model is."""
        return self.plan.model

    @property
    def config(self) -> ResolvedConfig:
        """Every setting decided."""
        return self.plan.resolved

    @property
    def capabilities(self) -> Capabilities:
        """What the device can do."""
        return self.plan.backend.capabilities

    def profile(self, folder: Path) -> AbstractContextManager[object]:
        """Records what the device does inside the context, into `folder`, for the backend's profile viewer."""
        return self.plan.backend.profile(folder)

    def stats(self) -> EngineStats:
        """A reading of every gauge and counter."""
        return EngineStats.read(self.scheduler, self.runner, self.seconds, self._idle)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(
                f"the engine stopped after an error ({self._dead!r}); start a new one"
            ) from self._dead


def _select_backend(config: EngineConfig) -> Backend:
    device = config.device
    neuron = NeuronOptions(
        emulate=device.emulate, runtime=device.neuron_runtime, logical_cores=device.neuron_logical_cores
    )
    return select_backend(device.device, device.tensor_parallel_size, neuron)


def _simulation(config: EngineConfig) -> Simulation:
    device = config.device
    if device.simulated_speed <= 0:
        raise InvalidConfigError(f"simulated_speed must be above 0, not {device.simulated_speed}")
    if device.simulated_output_tokens is not None and device.simulated_output_tokens < 1:
        raise InvalidConfigError(f"simulated_output_tokens must be at least 1, not {device.simulated_output_tokens}")
    return Simulation(mean_output_tokens=device.simulated_output_tokens, speed=device.simulated_speed)


def _refuse_simulation(config: EngineConfig) -> None:
    device = config.device
    if device.simulated_speed != 1.0 or device.simulated_output_tokens is not None:
        raise InvalidConfigError(
            f"simulated_speed and simulated_output_tokens are for simulated devices, and device is {device.device!r}"
        )


def _enable_compilation_cache() -> None:
    """Points jax's persistent cache at quire's folder, unless the process has chosen one itself."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _load(plan: EnginePlan, progress: Progress) -> Weights:
    options = plan.settings.model
    return Weights(
        *(part.load(options, lambda done, total: progress("load", done, total, "tensors")) for part in plan.models)
    )


def _admission(settings: LiveSettings) -> AdmissionPolicy:
    return make_admission_policy(
        settings.batching, window_seconds=settings.batching_window, max_num_seqs=settings.max_num_seqs
    )


def _make_scheduler(plan: EnginePlan, clock: Clock) -> Scheduler:
    config, resolved = plan.settings, plan.resolved
    settings = LiveSettings.of(config.scheduler, resolved)
    window = resolved.sliding_window
    has_draft_model = plan.draft is not None and plan.draft.head is None
    if window is not None and has_draft_model:
        window += MAX_DRAFT_LAG  # the draft model goes over the newest tokens once more
    kv_cache = KVCacheManager(
        resolved.num_kv_blocks,
        resolved.block_size,
        enable_prefix_caching=resolved.enable_prefix_caching,
        sliding_window=window,
    )
    drafts, speculation = None, config.speculation.parsed
    if speculation is not None:
        most = resolved.draft_counts[-1]
        drafts = DraftScheduler(
            kv_cache,
            DraftController((0, *resolved.draft_counts)) if speculation.adaptive else FixedDrafts(most),
            method=speculation.method,
            draft_counts=resolved.draft_counts,
            tile_size=resolved.limits.tile_size,
            max_tiles=resolved.limits.max_prefill_tiles,
        )
    return Scheduler(
        kv_cache,
        resolved.limits,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_model_len=resolved.max_model_len,
        admission=_admission(settings),
        decode_steps_per_dispatch=config.scheduler.decode_steps_per_dispatch,
        priority_seconds=settings.effective_priority_seconds,
        drafts=drafts,
        clock=clock.now,
    )
