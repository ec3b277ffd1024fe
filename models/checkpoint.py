"""Checkpoints in the Hugging Face layout: finding them, strict loading, export.

Loading is strict: every tensor the config calls for is there with the right shape, and every tensor in the files is
either used or of a kind known to be needless. Files are memory-mapped; besides the parameters already placed, host
memory holds one of them at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quire.kernels.errors import CheckpointError, ModelError
from quire.models.config import ModelConfig
from quire.models.params import Params, ParamSpec, Place, as_array, build_params, param_specs

BUNDLED = {"demo": "target", "demo-draft": "draft", "demo-eagle": "eagle"}
"""Names that stand for the folders of the bundled models, and of the EAGLE-3 head of the first, under models/demo."""
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
_NOT_DOWNLOADED = ("consolidated*", "*/*")  # the same weights again, in other layouts
_NEEDLESS = re.compile(r".*\.rotary_emb\.inv_freq")
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_MAX_NAMES = 40


def resolve_model(model: str) -> Path:
    """The local folder of a model: a folder as it is, one of `BUNDLED`, else a Hugging Face id, downloaded.

    Raises ModelError saying what was tried and what to do.
    """
    if model in BUNDLED:
        return Path(__file__).parent / "demo" / BUNDLED[model]
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(model, allow_patterns=list(_DOWNLOADED), ignore_patterns=list(_NOT_DOWNLOADED))
    except HFValidationError as error:
        raise ModelError(
            f"{model!r} is neither an existing folder, nor {' or '.join(map(repr, BUNDLED))}, nor a Hugging Face id "
            f"such as 'Qwen/Qwen3-0.6B': {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{model!r} is not an existing folder and could not be had from the Hugging Face Hub: {error} "
            "Check the name; for a gated or private model log in with `hf auth login`; without a network give a local "
            "folder, a model that is already in the Hub cache, or 'demo', the bundled model."
        ) from error
    return Path(found)


def load_params(
    folder: str | Path,
    config: ModelConfig,
    dtype: Any,
    *,
    stacked: bool,
    place: Place = as_array,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Loads every parameter in `dtype`, laid out as `quire.models.params` says.

    `place` is called within this function alone, with tensors that are read from the files as far as they are indexed.
    `progress(done, total)` is called when a tensor was read for the first time. Raises CheckpointError naming all
    tensors that are missing, left over or misshapen.
    """
    with TensorFiles(Path(folder)) as files:
        expected = {hf_name: parts[0][0].hf_shape for hf_name, parts in _sources(config).items()}
        is_tied = config.tie_word_embeddings
        check_tensors(files, expected, config.architecture, needless=("lm_head.weight",) if is_tied else ())
        total = sum(_num_reads(spec, config) for spec in param_specs(config).values())
        seen: set[str] = set()

        def note(hf_name: str, spec: ParamSpec) -> None:
            # A fused tensor is read once for each of its parts.
            num_seen = len(seen)
            seen.add(f"{hf_name}, {spec.name}")
            if progress is not None and len(seen) > num_seen:
                progress(len(seen), total)

        def make(spec: ParamSpec, layer: int | None) -> Any:
            return place(spec, StoredTensor(files, spec, layer, np.dtype(dtype), note))

        return build_params(config, make, stacked=stacked)


class StoredTensor:
    """A parameter that is still in its files, as a `HostTensor`: indexing it reads that part and no more."""

    def __init__(
        self,
        files: TensorFiles,
        spec: ParamSpec,
        layer: int | None,
        dtype: np.dtype,
        note: Callable[[str, ParamSpec], None] | None = None,
    ) -> None:
        self._files, self._spec, self._layer, self._note = files, spec, layer, note
        self.shape = spec.shape if layer is None else spec.layer_shape
        self.dtype = dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        spec = self._spec
        bounds = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        layers = list(bounds.pop(0)) if spec.is_per_layer and self._layer is None else [self._layer]
        experts = [None] if spec.num_experts is None else list(bounds.pop(0))
        if len(self.shape) == len(bounds):
            return self._read(spec.hf_name.format(layer=self._layer), bounds)
        several = tuple(len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True))
        out = np.empty(several, self.dtype)
        parts = out.reshape(-1, *several[len(several) - len(bounds) :])
        names = [spec.hf_name.format(layer=layer, expert=expert) for layer in layers for expert in experts]
        for name, part in zip(names, parts, strict=True):
            _copy(self._read(name, bounds), part)
        return out

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> np.ndarray:
        whole = self[tuple(slice(0, size) for size in self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=bool(copy))

    def _read(self, hf_name: str, bounds: list[range]) -> np.ndarray:
        """A part of one of the files' tensors in the file's own memory order: whoever packs it reads it there."""
        spec = self._spec
        if spec.transpose:
            bounds = bounds[::-1]
        else:
            bounds = list(bounds)
        if spec.rows is not None:  # a part of a fused tensor
            bounds[0] = range(bounds[0].start + spec.rows[0], bounds[0].stop + spec.rows[0])
        tensor = self._files.read(hf_name, tuple(slice(part.start, part.stop) for part in bounds))
        if self._note is not None:
            self._note(hf_name, spec)
        tensor = tensor if tensor.dtype == self.dtype else tensor.astype(self.dtype)
        return tensor.T if spec.transpose else tensor


def save_params(
    params: Params, config: ModelConfig, folder: str | Path, *, dtype: Any, shard_size: int = 5 * 10**9
) -> None:
    """Writes the parameters, stacked or not, under their Hugging Face names as `dtype`; config.json is the caller's.

    A checkpoint larger than `shard_size` bytes becomes several files and an index. One file's tensors are in host
    memory at a time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = _sources(config)
    itemsize = np.dtype(dtype).itemsize
    sizes = {hf_name: itemsize * int(np.prod(parts[0][0].hf_shape)) for hf_name, parts in sources.items()}
    shards = _shards(sizes, shard_size)
    weight_map: dict[str, str] = {}
    for shard_idx, hf_names in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{shard_idx + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {hf_name: _assemble(params, sources[hf_name], dtype) for hf_name in hf_names}
        save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers refuses a file without "format"
        weight_map |= dict.fromkeys(hf_names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class TensorFiles:
    """The tensors of a folder by name, whichever files they are in. Opens each file once; closes them on exit."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}
        self.folder = folder
        for file in _file_names(folder):
            try:
                opened = self._stack.enter_context(safe_open(folder / file, framework="np"))
            except (SafetensorError, FileNotFoundError) as error:
                self._stack.close()
                raise CheckpointError(f"{folder / file} cannot be read: {error}; download it again") from error
            self._opened |= dict.fromkeys(opened.keys(), opened)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the files."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._opened.items()}

    def dtype(self, name: str) -> str:
        """As safetensors calls it: "F32", "BF16", "I64"."""
        return str(self._opened[name].get_slice(name).get_dtype())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """That part of a tensor."""
        stored = self._opened[name].get_slice(name)
        if all(part == slice(0, size) for part, size in zip(index, stored.get_shape(), strict=True)):
            whole: np.ndarray = self._opened[name].get_tensor(name)
            return whole
        part: np.ndarray = stored[index]
        return part


def _file_names(folder: Path) -> list[str]:
    if (folder / INDEX_FILE).exists():
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    others = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f"; it has {', '.join(others[:3])}: convert it to safetensors first" if others else ""
    raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def check_tensors(
    files: TensorFiles, expected: Mapping[str, tuple[int, ...]], architecture: str, needless: Collection[str]
) -> None:
    """Compares all names, shapes and dtypes with what is expected before anything is read.

    `needless` are tensors that may be there and are not used. Raises CheckpointError naming all that is wrong.
    """
    shapes = files.shapes()
    problems = []
    if missing := [name for name in expected if name not in shapes]:
        problems.append(f"missing: {_listed(missing)}")
    if extra := [n for n in shapes if n not in expected and n not in needless and not _NEEDLESS.fullmatch(n)]:
        problems.append(f"left over: {_listed(extra)}")
    if misshapen := [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]:
        problems.append(f"misshapen: {_listed(misshapen)}")
    if odd := [f"{n} is {files.dtype(n)}" for n in expected if n in shapes and files.dtype(n) not in _FLOATS]:
        problems.append(f"not one of {', '.join(_FLOATS)}: {_listed(odd)}")
    if problems:
        raise CheckpointError(
            f"the tensors in {files.folder} are not those of a {architecture} with this config.json; "
            + "; ".join(problems)
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _num_reads(spec: ParamSpec, config: ModelConfig) -> int:
    return (config.num_layers if spec.is_per_layer else 1) * (spec.num_experts or 1)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies; a few rows of a transposed matrix at a time stay in cache, twice as fast as one copy of a large one."""
    rows = 32
    if source.flags.c_contiguous or source.ndim < 2:
        target[...] = source
        return
    for start in range(0, source.shape[1], rows):
        target[:, start : start + rows] = source[:, start : start + rows]


Source = tuple[ParamSpec, int | None, int | None]
"""Where a checkpoint tensor, or a part of it, is held: spec, layer, expert."""


def _sources(config: ModelConfig) -> dict[str, list[Source]]:
    """Every checkpoint tensor with what it is made of, in the order of its rows (several only where it is fused)."""
    sources: dict[str, list[Source]] = {}
    for spec in param_specs(config).values():
        for layer in range(config.num_layers) if spec.is_per_layer else [None]:
            for expert in [None] if spec.num_experts is None else range(spec.num_experts):
                hf_name = spec.hf_name.format(layer=layer, expert=expert)
                sources.setdefault(hf_name, []).append((spec, layer, expert))
    for parts in sources.values():
        parts.sort(key=lambda part: part[0].rows or (0, 0, 0))
    return sources


def _assemble(params: Params, parts: list[Source], dtype: Any) -> np.ndarray:
    if parts[0][0].rows is None:  # not fused; where there are several parts, it is held several times
        parts = parts[:1]
    arrays = [_as_in_checkpoint(params, *part) for part in parts]
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return np.ascontiguousarray(whole.astype(dtype))


def _as_in_checkpoint(params: Params, spec: ParamSpec, layer: int | None, expert: int | None) -> np.ndarray:
    layers: tuple[Mapping[str, Any], ...] | Mapping[str, Any] = params["layers"]
    if layer is None:
        array = np.asarray(params[spec.key])
    elif isinstance(layers, tuple):
        array = np.asarray(layers[layer][spec.key])
    else:
        array = np.asarray(layers[spec.key][layer])
    if expert is not None:
        array = array[expert]
    if array.shape != spec.layer_shape[-array.ndim :]:
        raise CheckpointError(f"{spec.name} has shape {list(array.shape)}, expected {list(spec.layer_shape)}")
    return array.T if spec.transpose else array


def _shards(sizes: dict[str, int], shard_size: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would go over `shard_size`; a tensor larger than that stands alone."""
    shards: list[list[str]] = [[]]
    used = 0
    for hf_name, size in sizes.items():
        if shards[-1] and used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(hf_name)
        used += size
    return shards
