"""Everything that is decided about an engine before its weights are read: what `EngineCore` builds from, and `quire compile` compiles."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from quire.backends.base import Backend, ShapeLimits, StepShape
from quire.engine.config import EngineConfig, ResolvedConfig, resolve
from quire.engine.device_state import DeviceState, empty_slots
from quire.engine.drafting import Drafter, ModelDrafter, NgramDrafter, Weights
from quire.engine.eagle_drafting import EagleDrafter
from quire.engine.model_plan import ModelPlan
from quire.engine.programs import EVERYWHERE, ProgramSource, abstract_on, slot_update_source, step_source
from quire.engine.speculation import SpeculativeConfig, check_vocabularies
from quire.engine.step import StepConfig
from quire.kernels.errors import InvalidConfigError
from quire.kernels.ops import Ops
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import resolve_model
from quire.models.config import ModelConfig
from quire.models.parallel import num_held_kv_heads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """One model on one backend, with every number decided, and the model that drafts for it where there is one."""

    settings: EngineConfig
    target: ModelPlan
    draft: ModelPlan | None
    resolved: ResolvedConfig

    @classmethod
    def make(cls, settings: EngineConfig, backend: Backend) -> EnginePlan:
        """Reads the model's config.json. Raises InvalidConfigError, ModelError or BackendError with the remedy."""
        mesh = backend.make_mesh(settings.device.tensor_parallel_size)
        folder = resolve_model(settings.model.model)
        target = ModelPlan.make(folder, settings, backend, mesh, settings.model.quantization)
        logger.info("kernels: %s", target.ops.describe().replace("\n", ", "))
        draft = _plan_draft(settings, target)
        return cls(settings, target, draft, _resolve(settings, target, draft, are_weights_loaded=False))

    def after_loading(self) -> EnginePlan:
        """The plan for the memory that is left once the weights are in it."""
        resolved = _resolve(self.settings, self.target, self.draft, are_weights_loaded=True)
        return dataclasses.replace(self, resolved=resolved)

    @property
    def model(self) -> ModelConfig:
        """What the target is."""
        return self.target.model

    @property
    def ops(self) -> Ops:
        """The target's kernels."""
        return self.target.ops

    @property
    def backend(self) -> Backend:
        """Where it runs."""
        return self.target.backend

    @property
    def mesh(self) -> Mesh:
        """The devices that share it."""
        return self.target.mesh

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        """The target, and the draft model where there is one."""
        return (self.target,) if self.draft is None else (self.target, self.draft)

    @property
    def features_shape(self) -> tuple[int, int] | None:
        """Of what a head keeps of each request on the device; None without one."""
        if self.draft is None or self.draft.head is None:
            return None
        return (self.resolved.max_num_seqs + 1, self.draft.model.hidden_size)

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """Every shape that is compiled."""
        return tuple(self.backend.step_shapes(_limits(self.settings, self.resolved, self.target, self.draft)))

    @property
    def step_config(self) -> StepConfig:
        """What is static about every step."""
        return StepConfig(
            self.target.step_model,
            self.resolved.block_size,
            self.resolved.max_logprobs,
            unroll_steps=not self.backend.capabilities.scan_layers,
            drafter=_drafter(self.settings.speculation.parsed, self.target, self.draft),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on each device."""
        return sum(part.weight_bytes for part in self.models)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on each device, in every cache."""
        return sum(part.block_bytes for part in self.models)

    @property
    def working_bytes(self) -> int:
        """Bytes of each device that the cache leaves to the temporary arrays of a step."""
        return _working_bytes_of(self.shapes, self.target, self.draft)

    def sources(self) -> list[ProgramSource]:
        """Every program of the engine, from abstract weights: what can be compiled on a machine that has neither them nor the device."""
        weights, state = self.abstract_weights(), self.abstract_state()
        steps = [step_source(self.step_config, shape, weights, state, self.mesh) for shape in self.shapes]
        return [*steps, slot_update_source(state.slots, self.mesh)]

    def abstract_weights(self) -> Weights:
        """Shapes, dtypes and shardings of all parameters."""
        return Weights(*(part.describe_weights() for part in self.models))

    def abstract_state(self) -> DeviceState:
        """The same of the device's state."""
        # Their sharding is what says which device the programs are for, also where it is one.
        whole = NamedSharding(self.mesh, EVERYWHERE)
        slots = abstract_on(
            empty_slots(self.resolved.max_num_seqs, self.resolved.max_model_len, self.model.vocab_size), whole
        )
        caches = [part.cache_arrays(self.resolved.num_kv_blocks).abstract(self.mesh) for part in self.models]
        state = DeviceState(caches[0], slots, *caches[1:])
        if self.features_shape is not None:
            features = jax.ShapeDtypeStruct(self.features_shape, jnp.dtype(self.target.dtype), sharding=whole)
            state = state.replace(draft_features=features)  # type: ignore[attr-defined]
        return state


def _plan_draft(settings: EngineConfig, target: ModelPlan) -> ModelPlan | None:
    speculation = settings.speculation.parsed
    if speculation is None or speculation.model is None:
        return None
    folder = resolve_model(speculation.model)
    quantization = speculation.quantization or settings.model.quantization
    try:
        if speculation.method == "eagle3":
            draft = ModelPlan.of_head(folder, target, settings, quantization)
        else:
            draft = ModelPlan.make(folder, settings, target.backend, target.mesh, quantization, target.dtype)
    except InvalidConfigError as error:
        raise InvalidConfigError(f"the draft model in {folder}: {error}") from error
    if speculation.method != "eagle3":
        check_vocabularies(target.folder, target.model, folder, draft.model, settings.model.tokenizer)
    logger.info("kernels of the draft model: %s", draft.ops.describe().replace("\n", ", "))
    return draft


def _drafter(speculation: SpeculativeConfig | None, target: ModelPlan, draft: ModelPlan | None) -> Drafter | None:
    if speculation is None:
        return None
    if draft is None:
        return NgramDrafter(speculation.prompt_lookup_min, speculation.prompt_lookup_max)
    if draft.head is not None:
        return EagleDrafter(draft.step_model, draft.head)
    # What it samples from is the target's vocabulary, also where the padding of the two tables differs.
    return ModelDrafter(dataclasses.replace(draft.step_model, num_sampled=target.model.vocab_size))


def _resolve(
    settings: EngineConfig, target: ModelPlan, draft: ModelPlan | None, *, are_weights_loaded: bool
) -> ResolvedConfig:
    backend, model, dtype = target.backend, target.model, target.dtype
    capabilities = backend.capabilities
    parts = [target] if draft is None else [target, draft]
    weight_bytes = 0 if are_weights_loaded else sum(part.weight_bytes for part in parts)
    utilization = settings.cache.memory_utilization or capabilities.memory_utilization

    def decide(step_bytes: int) -> ResolvedConfig:
        cache_bytes = backend.kv_cache_bytes(utilization, weight_bytes + step_bytes)
        if cache_bytes <= 0:
            free, needed = backend.kv_cache_bytes(1.0, 0) / 2**30, (weight_bytes + step_bytes) / 2**30
            raise InvalidConfigError(
                f"weights still to be read and a step's temporary arrays take {needed:.1f} GiB on each device as {dtype}, and "
                f"{free:.1f} GiB of it are free: spread the model over more devices (tensor_parallel_size), hold it in fewer "
                "bits (quantization, dtype), or take a smaller one"
            )
        return resolve(
            settings,
            model,
            capabilities,
            cache_bytes=cache_bytes,
            block_bytes=sum(part.block_bytes for part in parts),
            block_size=target.block_size,
            draft=None if draft is None else draft.model,
        )

    # How large steps are is decided first, and does not hang on the cache.
    shapes = backend.step_shapes(_limits(settings, decide(0), target, draft))
    return decide(_working_bytes_of(shapes, target, draft))


def _working_bytes_of(shapes: Sequence[StepShape], target: ModelPlan, draft: ModelPlan | None) -> int:
    """Of the largest step. Drafting takes less than verifying, of fewer tokens; a head reads hidden states that are kept for it."""
    gathered = 0 if target.ops.attends_in_place else target.block_bytes // target.model.num_layers
    captured = 0
    if draft is not None and draft.head is not None:
        captured = len(draft.head.captured_layers) * draft.head.target_hidden_size + 4 * draft.model.hidden_size
    itemsize = jnp.dtype(target.dtype).itemsize
    return max(
        working_bytes(target.model, target.dtype, shape, target.mesh.size, gathered)
        + shape.num_tokens * captured * itemsize
        for shape in shapes
    )


def working_bytes(model: ModelConfig, dtype: str, shape: StepShape, num_devices: int, gathered_block_bytes: int) -> int:
    """About what a step's temporary arrays take on one device: the widest layer's activations, and the logits of all its rows.

    `gathered_block_bytes` is what attention takes for each block that a row could have, where it gathers them. An
    estimate from above: `quire compile` prints it beside what the compiler says.
    """
    itemsize = jnp.dtype(dtype).itemsize
    heads = model.num_heads + 2 * num_held_kv_heads(model, num_devices)
    mlp = model.intermediate_size if model.moe is None else model.moe.intermediate_size * model.moe.num_experts
    widths = 4 * model.hidden_size + (2 * heads * model.head_dim + 3 * mlp) // num_devices
    logit_rows = shape.num_logit_rows + (shape.tile_size if shape.prompt_logprobs else 0)
    # Float32 logits, gathered, and what the sampler makes of them.
    num_logits = 2 if shape.sampling < SamplingMode.FULL else 5
    # Gathered as they are and once more with what a row does not see taken out, beside the scores.
    gathered = 3 * max(shape.decode_rows, shape.prefill_tiles) * shape.context_blocks * gathered_block_bytes
    return shape.num_tokens * widths * itemsize + num_logits * logit_rows * model.vocab_size * 4 + gathered


def _limits(
    settings: EngineConfig, resolved: ResolvedConfig, target: ModelPlan, draft: ModelPlan | None
) -> ShapeLimits:
    return ShapeLimits(
        max_num_seqs=resolved.max_num_seqs,
        max_prefill_tiles=resolved.limits.max_prefill_tiles,
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        decode_steps_per_dispatch=settings.scheduler.decode_steps_per_dispatch,
        is_padding_free=target.ops.is_padding_free,
        is_random_free=target.ops.is_random_free,
        most_sampling=SamplingMode[settings.device.sampling.upper()],
        draft_counts=resolved.draft_counts,
        has_draft_cache=draft is not None and draft.head is None,
    )
