"""EAGLE-3 heads on disk: which folder is one, whether it fits the target, and strict loading.

Two layouts are read. The published one (SafeAILab/EAGLE, SpecForge, ModelOpt) is a Llama's config.json with `draft_vocab_size`, and
tensors "midlayer.*"; the one of `speculators` holds that config as `transformer_layer_config`, and tensors "layers.0.*". In both `d2t`
[Vd] is what is added to a token of the head to have the target's, and `t2d` [V] says which tokens of the target the head has.

The layers whose inputs are captured are named in two places that count differently, as the engines that read them do: at the top of
config.json (`speculators`, vLLM) i is the input of layer i, in its `eagle_config` (SpecForge, ModelOpt, SGLang) the output of layer i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quire.kernels.errors import CheckpointError, ModelError, UnsupportedModelError
from quire.models.checkpoint import StoredTensor, TensorFiles, check_tensors
from quire.models.config import ModelConfig
from quire.models.eagle import (
    DRAFT_COLUMNS,
    EagleConfig,
    build_eagle_params,
    default_captured_layers,
    draft_columns,
    eagle_specs,
)
from quire.models.params import Params, ParamSpec, Place, as_array
from quire.models.registry import make_llama_config, read_config

Fields = dict[str, Any]

EAGLE3_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
_FIRST_PUBLISHED = "LlamaForCausalLM"  # the first heads are called so, and told apart from a Llama by draft_vocab_size
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_ONLY_VALUES: Fields = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
    "parallel_drafting": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}
"""Switches of heads that are built otherwise, with the one value that is implemented."""
_INTEGERS = ("I32", "I64")


def load_eagle_config(folder: str | Path, target: ModelConfig, max_model_len: int | None = None) -> EagleConfig:
    """Reads config.json, and the names and shapes of the tensors, of a head in a local folder.

    `max_model_len` is that of `quire.models.registry.load_config`. Raises UnsupportedModelError for what is not an EAGLE-3 head
    or is one of another build, ModelError for one that was made for another target, each with the values.
    """
    folder = Path(folder)
    raw = _flattened(read_config(folder))
    architecture = _architecture(raw, folder)
    _check_switches(raw, folder)
    # Some heads have the target's number of layers there; the tensors are those of one.
    model = make_llama_config(
        folder, raw | {"num_hidden_layers": 1, "tie_word_embeddings": False}, architecture, max_model_len
    )
    if model.vocab_size != target.vocab_size:
        raise ModelError(
            f"{folder} was made for a target with vocab_size {model.vocab_size}, this one has {target.vocab_size}; "
            "take the head that was trained for this model"
        )
    captured_layers = _captured_layers(raw, folder, target)
    with TensorFiles(folder) as files:
        shapes = files.shapes()
    _check_fc(shapes, folder, model, target, len(captured_layers))
    try:
        return EagleConfig(
            model=model,
            target_hidden_size=target.hidden_size,
            captured_layers=captured_layers,
            draft_vocab_size=raw.get("draft_vocab_size") or model.vocab_size,
            has_embedding="embed_tokens.weight" in shapes,
            norm_before_residual=bool(raw.get("norm_before_residual", False)),
            layer_prefix="layers.0." if any(name.startswith("layers.0.") for name in shapes) else "midlayer.",
        )
    except ValueError as error:
        raise ModelError(f"{folder} does not fit the target: {error}") from error


def load_eagle_params(folder: str | Path, config: EagleConfig, dtype: Any, *, place: Place = as_array) -> Params:
    """Loads a head's parameters in `dtype`, as `quire.models.checkpoint.load_params` does a model's.

    `place` gets whatever `eagle_specs` lists. Raises CheckpointError naming all tensors that are missing, left over or misshapen, and
    for a mapping of vocabularies that contradicts itself.
    """
    specs = eagle_specs(config)
    with TensorFiles(Path(folder)) as files:
        expected = {spec.hf_name: spec.hf_shape for spec in specs.values() if spec.name != DRAFT_COLUMNS}
        check_tensors(files, expected, "EAGLE-3 head", needless=("d2t", "t2d"))
        target_ids = _target_ids(files, config)

        def make(spec: ParamSpec, _: None) -> Any:
            if spec.name == DRAFT_COLUMNS:
                return place(spec, draft_columns(target_ids, config.model.vocab_size))
            return place(spec, StoredTensor(files, spec, None, np.dtype(dtype)))

        return build_eagle_params(config, make)


def _flattened(raw: Fields) -> Fields:
    """The published layout of a config.json in either."""
    layer = raw.get("transformer_layer_config")
    if not isinstance(layer, dict):
        return raw
    dtype = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name)}
    names = ("architectures", "draft_vocab_size", "target_hidden_size", _LAYER_IDS, *_ONLY_VALUES)
    # vLLM's default where the layout leaves it out.
    outside = {name: raw[name] for name in names if name in raw} | {
        "norm_before_residual": raw.get("norm_before_residual", True)
    }
    return layer | dtype | outside


def _architecture(raw: Fields, folder: Path) -> str:
    named = [str(name) for name in raw.get("architectures") or ()]
    for name in named:
        if name in EAGLE3_ARCHITECTURES or (name == _FIRST_PUBLISHED and raw.get("draft_vocab_size")):
            model_type = raw.get("model_type") or "llama"
            if model_type != "llama":
                raise UnsupportedModelError(
                    f"{folder} is an EAGLE-3 head with a layer of model_type {model_type!r}; supported is 'llama'"
                )
            return name
    raise UnsupportedModelError(
        f"{folder} is not an EAGLE-3 head: its architecture is {', '.join(named) or 'unnamed'}"
        + ("" if raw.get("draft_vocab_size") else ", without draft_vocab_size")
        + f"; supported are {', '.join(EAGLE3_ARCHITECTURES)}, and {_FIRST_PUBLISHED} with a draft_vocab_size. "
        "EAGLE-1 and EAGLE-2 heads are not; a model of its own can be used as a draft model"
    )


def _check_switches(raw: Fields, folder: Path) -> None:
    settings = raw | (raw.get("eagle_config") or {})
    for name, value in _ONLY_VALUES.items():
        if settings.get(name, value) not in (value, None):
            raise UnsupportedModelError(
                f"{folder} is an EAGLE-3 head with {name}={settings[name]!r}, which is not supported; only {value!r} is"
            )
    if "sliding_attention" in (settings.get("layer_types") or ()):
        raise UnsupportedModelError(f"{folder} is an EAGLE-3 head with a sliding window, which is not supported")


def _captured_layers(raw: Fields, folder: Path, target: ModelConfig) -> tuple[int, ...]:
    inputs, outputs = raw.get(_LAYER_IDS), (raw.get("eagle_config") or {}).get(_LAYER_IDS)
    layers = tuple(inputs or [i + 1 for i in outputs or ()]) or default_captured_layers(target.num_layers)
    if list(layers) != sorted({i for i in layers if i in range(target.num_layers + 1)}):
        named = f"{_LAYER_IDS} in config.json" if inputs or outputs else f"config.json has no {_LAYER_IDS}"
        raise ModelError(
            f"{folder} would read the inputs of layers {list(layers)} of the target ({named}), which has "
            f"{target.num_layers}; they must be different ones in ascending order: take the head that was trained for this model"
        )
    return layers


def _check_fc(
    shapes: dict[str, tuple[int, ...]], folder: Path, model: ModelConfig, target: ModelConfig, num_captured: int
) -> None:
    if "fc.weight" not in shapes:
        raise UnsupportedModelError(
            f"{folder} is not an EAGLE-3 head: it has no tensor fc.weight, which makes one feature of the target's "
            "hidden states; if it is a model of its own, use it as a draft model"
        )
    expected = (model.hidden_size, num_captured * target.hidden_size)
    if (shape := shapes["fc.weight"]) == expected:
        return
    if "d2t" not in shapes and shape == (model.hidden_size, 2 * model.hidden_size):
        raise UnsupportedModelError(
            f"{folder} is an EAGLE-1 or EAGLE-2 head: its fc.weight {list(shape)} takes an embedding and one hidden state. "
            f"Supported are EAGLE-3 heads, here with {list(expected)}"
        )
    raise ModelError(
        f"{folder} was made for another target: its fc.weight is {list(shape)}, and for hidden states of {num_captured} layers "
        f"of {target.hidden_size} and a head of {model.hidden_size} it would be {list(expected)}; take the head that was trained "
        "for this model"
    )


def _target_ids(files: TensorFiles, config: EagleConfig) -> np.ndarray:
    """The target's id of each of the head's tokens, int64 [Vd]; checks the files' two accounts of it against each other."""
    num_draft, num_target = config.draft_vocab_size, config.model.vocab_size
    offsets = _vector(files, "d2t", num_draft, _INTEGERS)
    if offsets is None:
        if not config.drafts_all_tokens:
            raise CheckpointError(
                f"{files.folder} has no tensor d2t, and its draft_vocab_size is {num_draft} of {num_target} tokens: which ones "
                "is not known; download it again, or convert it with d2t"
            )
        offsets = np.zeros(num_draft, np.int64)
    if config.drafts_all_tokens and offsets.any():
        raise CheckpointError(
            f"d2t in {files.folder} moves tokens although draft_vocab_size is the target's, {num_target}: it must be zeros"
        )
    target_ids: np.ndarray = np.arange(num_draft, dtype=np.int64) + offsets
    if target_ids.min() < 0 or target_ids.max() >= num_target:
        raise CheckpointError(
            f"d2t in {files.folder} leads to tokens from {target_ids.min()} to {target_ids.max()}; the target has {num_target}: "
            "take the head that was trained for this model"
        )
    if len(np.unique(target_ids)) < num_draft:
        raise CheckpointError(f"d2t in {files.folder} leads to some token of the target twice; download it again")
    is_drafted = _vector(files, "t2d", num_target, ("BOOL",))
    # Where all tokens are the head's own, some writers leave zeros there.
    if is_drafted is None or config.drafts_all_tokens:
        return target_ids
    if not np.array_equal(np.flatnonzero(is_drafted), np.sort(target_ids)):
        raise CheckpointError(f"d2t and t2d in {files.folder} name different tokens of the target; download it again")
    return target_ids


def _vector(files: TensorFiles, name: str, size: int, dtypes: tuple[str, ...]) -> np.ndarray | None:
    """A tensor of the vocabularies' mapping; None where there is none."""
    shape = files.shapes().get(name)
    if shape is None:
        return None
    if shape != (size,) or files.dtype(name) not in dtypes:
        raise CheckpointError(
            f"{name} in {files.folder} is {list(shape)} of {files.dtype(name)}, expected {[size]} of {' or '.join(dtypes)}: "
            "it does not belong to this config.json and this target"
        )
    return files.read(name, (slice(0, size),))
