"""Checkpoints in the Hugging Face layout, read and written without torch, one tensor at a time."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_sampler._arguments import brief, check_floating, check_int
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import WeightsError
from grpo_sampler._layout import Index, Leaf, check_params, leaves, listed, value_of
from grpo_sampler._network import Params

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMPARED_ROWS = 4096

ShardingChoice = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | Mapping[str, Any] | None


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: ShardingChoice = None,
    revision: str | None = None,
) -> tuple[ModelConfig, Params]:
    """Reads a model in Hugging Face layout, straight into the requested type and onto the requested devices.

    Each device's part of a parameter is read from the file separately: besides what the devices hold, the host never
    holds more than one stacked parameter, or one device's part of it.

    Args:
        path_or_hub_id: a folder with config.json and one or more safetensors files; or, if there is no such folder, a
            Hub id, which needs `huggingface-hub`.
        dtype: floating type of the parameters; None for the type that the checkpoint is stored in.
        sharding: one sharding for all parameters, a function from a path such as `layers/q` to a sharding, or a tree of
            shardings like the parameters; None for the default device.
        revision: branch, tag or commit of a Hub id.

    Returns:
        (config, params).

    Raises:
        UnsupportedModelError: an architecture that is not supported.
        SamplerError: a config.json that is missing or invalid, or a `dtype` that is not floating.
        WeightsError: no such model; a tensor that is missing, unexpected, misshaped or not finite; a damaged file;
            weights of several types and no `dtype`.
    """
    folder = _folder(path_or_hub_id, revision)
    if dtype is not None:
        dtype = check_floating("dtype", dtype)
    config = ModelConfig.from_file(folder)
    table = leaves(config)
    params: Params = {}
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        _check(files, table, config, folder)
        target = _stored_dtype(files, table, folder) if dtype is None else dtype
        for leaf in table:
            branch = params
            for key in leaf.path[:-1]:
                branch = branch.setdefault(key, {})
            branch[leaf.path[-1]] = _place(leaf, files, target, _pick(sharding, leaf))
    return config, params


def save_pretrained(
    folder: str | os.PathLike[str], config: ModelConfig, params: Params, *, max_shard_bytes: int = 4_000_000_000
) -> None:
    """Writes config.json and safetensors, which transformers loads and `load_pretrained` reads back bit for bit.

    Parameters on several processes are gathered one tensor at a time: every process must call this, and the first one
    writes. Weight files of an earlier save in the folder are replaced.

    Args:
        folder: where to write; created if necessary.
        config: the model.
        params: its parameters, all of the same type.
        max_shard_bytes: size above which the weights are split into several files with an index.

    Raises:
        SamplerError: `config` is not a ModelConfig, or `max_shard_bytes` is not positive.
        WeightsError: parameters that do not match the configuration, or are of several types.
        OSError: the folder cannot be written.
    """
    check_params(params, config)
    check_int("max_shard_bytes", max_shard_bytes, 1, 2**63 - 1)
    if config.lora is not None:
        raise WeightsError(
            "params must be without adapters: got config.lora. Save `merge_adapters(params, config)` with "
            "`dataclasses.replace(config, lora=None)`, or the adapters alone with `save_adapters`."
        )
    table = leaves(config)
    values = {leaf: value_of(params, leaf.path) for leaf in table}
    dtypes = {np.dtype(value.dtype).name for value in values.values()}
    if len(dtypes) > 1:
        raise WeightsError(f"params must all have one type: got {', '.join(sorted(dtypes))}. Cast them first.")
    shards: list[list[tuple[Leaf, int | None]]] = [[]]
    sizes = [0]
    for leaf in table:
        for layer in [None] if leaf.layers is None else range(leaf.layers):
            size = int(np.prod(leaf.stored_shape)) * values[leaf].dtype.itemsize
            if sizes[-1] and sizes[-1] + size > max_shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((leaf, layer))
            sizes[-1] += size
    count = len(shards)
    names = [_SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    writes = jax.process_index() == 0
    target = Path(folder)
    if writes:
        target.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for name, shard in zip(names, shards):
        tensors = {}
        for leaf, layer in shard:
            value = values[leaf] if layer is None else values[leaf][layer]
            tensors[leaf.name.format(layer)] = leaf.stored(_on_host(value))
        where |= dict.fromkeys(tensors, name)
        if writes:
            write_tensors(tensors, target / name)
    if not writes:
        return
    for stale in [*target.glob("model-*-of-*.safetensors"), target / _SINGLE, target / _INDEX]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    if count > 1:
        _write_json(
            target / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
        )
    _write_json(target / "config.json", config.to_hf(dtypes.pop()))


def write_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Write under another name and rename when complete: a killed save leaves no partial file under this one."""
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    part.touch()
    mode = part.stat().st_mode  # what the umask allows; safetensors' own file is its owner's alone
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(mode)
    os.replace(part, file)


def _folder(path_or_hub_id: str | os.PathLike[str], revision: str | None) -> Path:
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise WeightsError(f"path_or_hub_id must be a folder or a Hub id: got {brief(path_or_hub_id)}.")
    path = Path(path_or_hub_id)
    try:
        if path.is_dir():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise WeightsError(f"{brief(os.fspath(path))} cannot be read: {error.strerror}.") from error
    name = os.fspath(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise WeightsError(
            f"{name!r} must be a local folder or a Hub id like 'Qwen/Qwen2.5-0.5B': there is no such folder."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"{name!r} is not a local folder. To download it from the Hub, `pip install huggingface-hub`."
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise WeightsError(f"{name!r} is not a local folder, and the Hub download failed: {error}") from error


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Opens every weight file; the file of each tensor by name. Only headers are read here."""
    promised: dict[str, str] = {}
    if (folder / _SINGLE).exists():
        names = [_SINGLE]
    elif (folder / _INDEX).exists():
        try:
            promised = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(f"{folder / _INDEX} must contain a weight_map: {error!r}.") from error
        names = _file_names(promised, folder)
    else:
        raise WeightsError(
            f"{folder} must contain {_SINGLE} or {_INDEX}: got neither. Only safetensors are read; "
            "convert other formats with transformers' save_pretrained."
        )
    files: dict[str, Any] = {}
    for name in names:
        try:
            if not (folder / name).exists():
                raise WeightsError(f"{folder / name} must exist, because the index names it: it does not.")
            if not (folder / name).is_file():
                raise WeightsError(f"{folder / name} must be a file: it is a folder or a device.")
            file = stack.enter_context(safe_open(folder / name, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{folder / name} must be a complete safetensors file: {error}. Download it again."
            ) from error
        # Of a tensor in two files the index says which one counts.
        files |= {key: file for key in file.keys() if promised.get(key, name) == name}  # noqa: SIM118 - not a mapping
    lost = sorted(set(promised) - set(files))
    if lost:
        raise WeightsError(f"{folder / _INDEX} must name only tensors of its files: no file holds {listed(lost)}.")
    return files


def _file_names(weight_map: Any, folder: Path) -> list[str]:
    """The files of an index. They must lie beside it: a checkpoint has no business elsewhere."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / _INDEX}: weight_map must map tensors to files: got {brief(weight_map)}.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise WeightsError(
                f"{folder / _INDEX}: weight_map must name safetensors files of its own folder: got {brief(name)} for "
                f"{brief(tensor)}."
            )
    return sorted(set(weight_map.values()))


def _check(files: Mapping[str, Any], table: list[Leaf], config: ModelConfig, folder: Path) -> None:
    """Checks that all tensors are there with the right shapes, and no others."""
    expected = {name: leaf for leaf in table for name in leaf.tensor_names()}
    missing = sorted(set(expected) - set(files))
    if missing:
        raise WeightsError(f"{folder} must contain every tensor of its config.json: missing {listed(missing)}.")
    # Old checkpoints contain the rotary table; tied ones may contain their embedding twice.
    unexpected = sorted(name for name in set(files) - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    if config.tied and "lm_head.weight" in unexpected:
        unexpected.remove("lm_head.weight")
        head, embed = (files[name].get_slice(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        size = embed.get_shape()[0]
        blocks = [slice(at, min(at + _COMPARED_ROWS, size)) for at in range(0, size, _COMPARED_ROWS)]
        if head.get_shape() != embed.get_shape() or any(not np.array_equal(head[at], embed[at]) for at in blocks):
            raise WeightsError(
                f"{folder} ties its embeddings but contains a different lm_head.weight. "
                'Set "tie_word_embeddings": false in config.json to use it.'
            )
    if unexpected:
        raise WeightsError(f"{folder} must contain only the tensors of its config.json: got also {listed(unexpected)}.")
    for name, leaf in expected.items():
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != leaf.stored_shape:
            raise WeightsError(f"{name} must have shape {leaf.stored_shape}: got {tuple(stored.get_shape())}.")
        if stored.get_dtype() not in _FLOATS:
            raise WeightsError(f"{name} must be one of {', '.join(sorted(_FLOATS))}: got {stored.get_dtype()}.")


def _stored_dtype(files: Mapping[str, Any], table: list[Leaf], folder: Path) -> jnp.dtype:
    """The one type that all weights of a checkpoint are stored in."""
    stored = {files[name].get_slice(name).get_dtype() for leaf in table for name in leaf.tensor_names()}
    if len(stored) > 1:
        raise WeightsError(
            f"{folder} must hold weights of one type to be loaded without dtype: got {', '.join(sorted(stored))}. "
            "Pass the type you want, such as dtype=jnp.float32."
        )
    return jax.dtypes.canonicalize_dtype(_FLOATS[stored.pop()])


def _place(leaf: Leaf, files: Mapping[str, Any], dtype: jnp.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Reads one parameter, each device's part separately."""
    names = leaf.tensor_names()

    def block(index: Index | None) -> np.ndarray:
        index = tuple(slice(None) for _ in leaf.shape) if index is None else index
        inner = index if leaf.layers is None else index[1:]
        chosen = names if leaf.layers is None else names[index[0]]
        parts: Iterator[np.ndarray] = (
            leaf.read(lambda at, name=name: files[name].get_slice(name)[at], inner) for name in chosen
        )
        if leaf.layers is None:
            with np.errstate(over="ignore"):  # what the type cannot hold is named by _finite
                return _finite(np.asarray(next(parts), dtype=dtype, order="C"), names[0])
        first = next(parts)
        out = np.empty((len(chosen), *first.shape), dtype)
        for i, part in enumerate(itertools.chain([first], parts)):
            with np.errstate(over="ignore"):
                out[i] = part
            _finite(out[i], chosen[i])
        return out

    if sharding is None:
        return jax.device_put(block(None))
    return jax.make_array_from_callback(leaf.shape, sharding, block, dtype=dtype)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    """Returns the values, unless one is NaN or infinite: training diverged, or the type is too narrow."""
    if values.dtype.itemsize == 2:
        # Numbers whose exponent is all ones: many times as fast as ml_dtypes' own test.
        exponent = np.uint16(0x7F80 if values.dtype == jnp.bfloat16 else 0x7C00)
        bad = (values.view(np.uint16) & exponent) == exponent
    else:
        bad = ~np.isfinite(values)
    if bad.any():
        raise WeightsError(
            f"weights must be finite: {name} holds {int(bad.sum()):,} values that are NaN or infinite, as "
            f"{values.dtype.name}. Download it again, or use an earlier checkpoint of its training."
        )
    return values


def _pick(sharding: ShardingChoice, leaf: Leaf) -> jax.sharding.Sharding | None:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    if isinstance(sharding, Mapping):
        found: Any = sharding
        for key in leaf.path:
            if not isinstance(found, Mapping) or key not in found:
                raise WeightsError(f"sharding must have an entry for {'/'.join(leaf.path)}: it has none.")
            found = found[key]
        return found
    return sharding("/".join(leaf.path))


def _on_host(value: jax.Array) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
