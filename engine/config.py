"""The engine's settings: frozen, composed, each field with the sentence that explains it.

`EngineConfig.from_arguments` takes them flat, as `LLM(...)` and the command line spell them; the flags are made from the fields. None
stands for "decide for me": `resolve` fills it in from the model and the device, into a new object, and says what it chose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from quire.backends.base import Capabilities
from quire.backends.chips import chips
from quire.backends.neuron import RUNTIMES
from quire.engine.admission import BATCHING_POLICIES, BatchingPolicy
from quire.engine.sampling_params import MAX_LOGPROBS
from quire.engine.speculation import SpeculativeConfig
from quire.engine.step_data import StepLimits
from quire.kernels.errors import InvalidConfigError
from quire.kernels.linear.contract import QUANTIZATIONS
from quire.kernels.sampling.rows import SamplingMode
from quire.models.config import ModelConfig

DTYPES = ("auto", "float32", "bfloat16")
LOAD_FORMATS = ("auto", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority")
SAMPLING_LEVELS = tuple(mode.name.lower() for mode in SamplingMode)


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and in which form."""

    model: str = _option("demo", "Hugging Face id, a folder, or demo / demo-draft for the bundled models.")
    tokenizer: str | None = _option(None, "Id or folder of the tokenizer; the model's own when left out.")
    load_format: Literal["auto", "dummy"] = _option(
        "auto", "auto reads the checkpoint; dummy makes random weights from config.json alone.", LOAD_FORMATS
    )
    dtype: str = _option("auto", "Dtype of weights, activations and cache; auto is the device's choice.", DTYPES)
    quantization: Literal["none", "int8"] = _option(
        "none",
        "int8 holds weights as 8-bit integers per output channel, and quantizes activations per token.",
        QUANTIZATIONS,
    )
    max_model_len: int | None = _option(None, "Most tokens of prompt and output together.")
    seed: int = _option(0, "Seed of requests that bring none, and of dummy weights.")


@dataclass(frozen=True)
class CacheOptions:
    """How the KV cache is laid out."""

    block_size: int | None = _option(None, "Tokens in one block of the KV cache.")
    num_kv_blocks: int | None = _option(None, "Blocks of the KV cache; from the device's free memory when left out.")
    memory_utilization: float | None = _option(
        None, "Share of the memory left after loading that the KV cache may take; the device's own when left out."
    )
    enable_prefix_caching: bool = _option(True, "Reuse the blocks of prompts that begin alike.")


@dataclass(frozen=True)
class SchedulerOptions:
    """How requests share the device."""

    max_num_seqs: int | None = _option(None, "Most requests that run at once.")
    max_num_batched_tokens: int | None = _option(None, "Most tokens in one step, decode rows and prompts together.")
    scheduling_policy: Literal["fcfs", "priority"] = _option(
        "fcfs",
        "fcfs serves in order of arrival; priority also by the request's number, low first.",
        SCHEDULING_POLICIES,
    )
    priority_seconds: float = _option(
        60.0, "Under the priority policy, how many seconds later a request counts as arrived per unit of priority."
    )
    batching: BatchingPolicy = _option(
        "continuous", "When waiting requests are let in; windowed and static are baselines.", BATCHING_POLICIES
    )
    batching_window: float = _option(0.05, "Seconds that requests gather under windowed batching.")
    async_scheduling: bool = _option(True, "Launch a step before the tokens of the last one are read.")
    decode_steps_per_dispatch: int = _option(1, "Decode steps in one dispatch while nobody waits to be let in.")


@dataclass(frozen=True)
class SpeculationOptions:
    """How tokens are drafted ahead, to be verified several at once."""

    speculative_config: Mapping[str, Any] | str | None = _option(
        None,
        "Speculative decoding, as JSON: method (draft_model, ngram, eagle3), model, num_speculative_tokens, prompt_lookup_max, "
        "prompt_lookup_min, adaptive, quantization.",
    )

    @property
    def parsed(self) -> SpeculativeConfig | None:
        """What was asked for. Raises InvalidConfigError for what cannot be."""
        return None if self.speculative_config is None else SpeculativeConfig.parse(self.speculative_config)


@dataclass(frozen=True)
class DeviceOptions:
    """Where and how it runs."""

    device: str = _option(
        "auto",
        "auto, cpu, tpu, neuron, or simulated:CHIP:DEVICES, as simulated:v6e:4: nothing is computed, and steps take as long.",
    )
    simulated_speed: float = _option(1.0, "How many times faster than the chip a simulated one goes.")
    simulated_output_tokens: float | None = _option(
        None, "Tokens after which a simulated model ends an answer, in the mean; never, when left out."
    )
    tensor_parallel_size: int = _option(1, "Devices that one model is spread over.")
    kernels: str | None = _option(None, "Force implementations: op=name, several separated by commas.")
    sampling: str = _option(
        "full", "The most that requests may ask of the sampler; less means fewer programs to compile.", SAMPLING_LEVELS
    )
    emulate: str | None = _option(
        None,
        "Have the CPU behave like a Neuron chip: its step shapes, its limits, the path that XLA takes there.",
        tuple(chips("neuron")),
    )
    neuron_runtime: str = _option(
        "auto",
        "Who runs programs on NeuronCores: jax's plugin (pjrt), or torch-neuronx (neff); auto takes what is installed.",
        RUNTIMES,
    )
    neuron_logical_cores: int | None = _option(
        None, "Physical NeuronCores that make one device, 1 or 2; the chip's own default when left out."
    )
    compilation_cache: bool = _option(True, "Keep compiled programs on disk ($QUIRE_CACHE) for the next start.")


@dataclass(frozen=True)
class EngineConfig:
    """Everything a user can set, as given."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    @classmethod
    def from_arguments(cls, **arguments: Any) -> EngineConfig:
        """From flat keyword arguments. Raises InvalidConfigError naming an unknown one, or a value that cannot be."""
        groups: dict[str, Any] = {}
        known = set()
        for group in fields(cls):
            options_type = _GROUPS[group.name]
            names = {option.name for option in fields(options_type)}
            known |= names
            groups[group.name] = options_type(**{k: v for k, v in arguments.items() if k in names})
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise InvalidConfigError(f"unknown setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        config = cls(**groups)
        config.check()
        return config

    def check(self) -> None:
        """Raises InvalidConfigError for a value that no model or device could make right."""
        for group in fields(self):
            for option in fields(_GROUPS[group.name]):
                value = getattr(getattr(self, group.name), option.name)
                _check_value(option, value)
        _ = self.speculation.parsed
        if self.cache.memory_utilization is not None and not 0.0 < self.cache.memory_utilization <= 1.0:
            raise InvalidConfigError(
                f"memory_utilization is a share of memory, above 0 and at most 1, not {self.cache.memory_utilization}"
            )


_GROUPS: dict[str, Any] = {
    "model": ModelOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "speculation": SpeculationOptions,
    "device": DeviceOptions,
}


def _check_value(option: dataclasses.Field[Any], value: Any) -> None:
    choices = option.metadata["choices"]
    if choices is not None and value not in (*choices, option.default):
        raise InvalidConfigError(f"{option.name}={value!r} is not one of {', '.join(choices)}")
    annotation = str(option.type)
    if value is None:
        if "None" not in annotation:
            raise InvalidConfigError(f"{option.name} must not be None")
    elif annotation.startswith("bool"):
        if not isinstance(value, bool):
            raise InvalidConfigError(f"{option.name} must be True or False, not {value!r}")
    elif annotation.startswith("int"):
        least = 0 if option.name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidConfigError(f"{option.name} must be a whole number of at least {least}, not {value!r}")
    elif annotation.startswith("float"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise InvalidConfigError(f"{option.name} must be a finite number of at least 0, not {value!r}")
    elif annotation.startswith("Mapping"):
        pass  # it says itself what it may hold
    elif not isinstance(value, str):
        raise InvalidConfigError(f"{option.name} must be a string, not {value!r}")


@dataclass(frozen=True)
class ResolvedConfig:
    """Every number decided. `notes` are sentences about decisions that a user may want to overrule."""

    dtype: str
    max_model_len: int
    block_size: int
    num_kv_blocks: int
    enable_prefix_caching: bool
    sliding_window: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    limits: StepLimits
    draft_counts: tuple[int, ...]
    """How many tokens a step may draft for each row, ascending; none without speculation."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LiveSettings:
    """The scheduler settings that can change while serving: none of them changes a compiled shape."""

    max_num_seqs: int
    max_num_batched_tokens: int
    batching: BatchingPolicy
    batching_window: float
    scheduling_policy: Literal["fcfs", "priority"]
    priority_seconds: float

    @classmethod
    def of(cls, options: SchedulerOptions, resolved: ResolvedConfig) -> LiveSettings:
        """What the engine starts with."""
        return cls(
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            batching=options.batching,
            batching_window=options.batching_window,
            scheduling_policy=options.scheduling_policy,
            priority_seconds=options.priority_seconds,
        )

    @property
    def effective_priority_seconds(self) -> float:
        """Seconds of delay per unit of priority; 0 where requests are served in order of arrival."""
        return self.priority_seconds if self.scheduling_policy == "priority" else 0.0

    def changed(self, changes: Mapping[str, object], resolved: ResolvedConfig) -> LiveSettings:
        """These settings with `changes`. Raises InvalidConfigError for what is unknown, or beyond what was compiled."""
        options = {option.name: option for option in fields(SchedulerOptions)}
        for name, value in changes.items():
            if name not in {setting.name for setting in fields(self)}:
                known = ", ".join(setting.name for setting in fields(self))
                raise InvalidConfigError(f"{name} cannot be changed while serving; these can: {known}")
            if value is None:
                raise InvalidConfigError(f"{name} must not be null")
            _check_value(options[name], value)
        settings = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        if settings.max_num_seqs > resolved.max_num_seqs:
            raise InvalidConfigError(
                f"max_num_seqs={settings.max_num_seqs} is more than the {resolved.max_num_seqs} that shapes were compiled for; "
                "start the server with more"
            )
        least, most = settings.max_num_seqs + resolved.limits.tile_size, resolved.max_num_batched_tokens
        if not least <= settings.max_num_batched_tokens <= most:
            raise InvalidConfigError(
                f"max_num_batched_tokens={settings.max_num_batched_tokens} must be at least {least} (a decode row of each of "
                f"max_num_seqs={settings.max_num_seqs} requests and a prefill tile) and at most {most}, as compiled"
            )
        return settings


def resolve_dtype(config: EngineConfig, model: ModelConfig, capabilities: Capabilities) -> str:
    """The dtype to load weights in. Raises InvalidConfigError for one the device lacks."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = capabilities.default_dtype or model.dtype
        # Half precision is a storage format of checkpoints; bfloat16 is what the devices compute in.
        dtype = "bfloat16" if dtype == "float16" else dtype
    if dtype not in capabilities.dtypes:
        raise InvalidConfigError(
            f"dtype {dtype!r} does not run on {capabilities.platform}; there are: {', '.join(capabilities.dtypes)}"
        )
    return dtype


def resolve(
    config: EngineConfig,
    model: ModelConfig,
    capabilities: Capabilities,
    *,
    cache_bytes: int,
    block_bytes: int,
    block_size: int,
    draft: ModelConfig | None,
) -> ResolvedConfig:
    """Decides what was left open, and checks that the parts fit each other.

    Args:
        cache_bytes: what the device can give to the KV cache.
        block_bytes: what one block of `block_size` tokens takes over all layers, those of a draft model included.
        draft: the draft model, where there is one.

    Raises InvalidConfigError with both numbers and the remedy where something does not fit.
    """
    notes: list[str] = []
    max_num_seqs = config.scheduler.max_num_seqs or capabilities.max_num_seqs
    max_model_len = _max_model_len(config, model, capabilities, notes)
    if draft is not None and draft.max_position_embeddings < max_model_len:
        notes.append(
            f"the model that drafts was made for {draft.max_position_embeddings} positions and max_model_len is {max_model_len}: "
            "beyond them drafts may be accepted less often, which costs time and changes no token; a request with "
            "num_speculative_tokens=0 is spared that"
        )
    blocks_per_request = -(-max_model_len // block_size)
    num_kv_blocks = config.cache.num_kv_blocks
    if num_kv_blocks is None:
        # More than every running request at full length is only of use to the prefix cache: leave the memory alone.
        num_kv_blocks = min(cache_bytes // block_bytes, max_num_seqs * blocks_per_request + 1)
    if num_kv_blocks - 1 < blocks_per_request:
        raise InvalidConfigError(
            f"the KV cache has {num_kv_blocks - 1} usable blocks of {block_size} tokens, and one request of max_model_len="
            f"{max_model_len} needs {blocks_per_request}; lower max_model_len or give the cache more "
            f"(num_kv_blocks, memory_utilization; {cache_bytes / 2**20:.0f} MiB were free for it)"
        )
    tile_size = capabilities.tile_size
    max_num_batched_tokens = config.scheduler.max_num_batched_tokens or max_num_seqs + capabilities.max_prefill_tokens
    if max_num_batched_tokens < max_num_seqs + tile_size:
        raise InvalidConfigError(
            f"max_num_batched_tokens={max_num_batched_tokens} has no room for a decode row of each of max_num_seqs="
            f"{max_num_seqs} requests and a prefill tile of {tile_size} tokens; raise it to {max_num_seqs + tile_size} "
            "or lower max_num_seqs"
        )
    limits = StepLimits(
        max_decode_rows=max_num_seqs,
        max_prefill_tiles=(max_num_batched_tokens - max_num_seqs) // tile_size,
        tile_size=tile_size,
        mixed_batches=capabilities.mixed_batches,
    )
    speculation = config.speculation.parsed
    # A block is out of sight when no layer of either model sees it. A head's entries do not stay in the blocks of their tokens.
    windows = {max(layers, key=_window_key) for layers in (m.sliding_windows for m in (model, draft) if m is not None)}
    stays = speculation is None or speculation.method != "eagle3"
    same = stays and all(len(set(m.sliding_windows)) == 1 for m in (model, draft) if m is not None)
    sliding_window = max(windows, key=_window_key) if same else None
    return ResolvedConfig(
        dtype=resolve_dtype(config, model, capabilities),
        max_model_len=max_model_len,
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        sliding_window=sliding_window,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_logprobs=min(MAX_LOGPROBS, model.vocab_size),
        limits=limits,
        draft_counts=() if speculation is None else speculation.draft_counts(capabilities.num_draft_counts),
        notes=tuple(notes),
    )


def _window_key(window: int | None) -> float:
    return math.inf if window is None else window


def resolve_block_size(config: EngineConfig, capabilities: Capabilities) -> int:
    """Tokens in one block. Raises InvalidConfigError where the device needs another multiple."""
    block_size = config.cache.block_size or capabilities.block_size
    if block_size % capabilities.block_size_multiple:
        raise InvalidConfigError(
            f"block_size={block_size} is not a multiple of {capabilities.block_size_multiple}, as {capabilities.platform} needs"
        )
    return block_size


def _max_model_len(config: EngineConfig, model: ModelConfig, capabilities: Capabilities, notes: list[str]) -> int:
    wanted = config.model.max_model_len
    longest = model.max_position_embeddings
    if wanted is None:
        if longest <= capabilities.default_max_model_len:
            return longest
        notes.append(
            f"max_model_len is {capabilities.default_max_model_len}, as {capabilities.platform} has it; the model was made "
            f"for {longest}: set max_model_len for longer sequences"
        )
        return capabilities.default_max_model_len
    if wanted > longest:
        raise InvalidConfigError(
            f"max_model_len={wanted} is beyond the {longest} positions the model was made for; lower it to {longest}"
        )
    return wanted


def option_fields() -> list[dataclasses.Field[Any]]:
    """Every setting's field, for making flags and documentation of it."""
    return [option for options_type in _GROUPS.values() for option in fields(options_type)]
