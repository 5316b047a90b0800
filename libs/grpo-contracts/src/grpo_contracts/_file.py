"""Batch files: an uncompressed zip of `header.json` and one `.npy` member per array.

`numpy.load(path, allow_pickle=False)` reads the arrays, any JSON reader the header; nothing in a file is executed.
The header names the format, its version and the stage, and mirrors the batch: sizes, sampling parameters, policy
version and names as JSON, `{"array": name}` for an array, and null for an optional array that is absent.
A minor version adds fields with defaults; a major version renames fields or changes their meaning.

json and zipfile are imported where they are used, to keep `import grpo_contracts` fast.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from math import prod
from typing import Any

import numpy as np

from ._arrays import describe
from ._errors import ContractError, broken
from ._provenance import PolicyVersion, SamplingParams
from ._stages import STAGES, Stage
from ._validate import NESTED, fetch, validate

FORMAT = "grpo-contracts/batch"
VERSION = (2, 0)
_HEADER = "header.json"
_LONGEST_HEADER = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal batches give equal bytes, whenever they are written
_NPY = (
    rb"\{'descr': '([<|][bif][148])', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n"
)
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, OverflowError, KeyError, TypeError)
"""What zipfile raises, besides its own error, for missing, truncated, encrypted or forged files, or no path at all."""


def save_batch(batch: Stage, path: str | os.PathLike[str]) -> None:
    """Write a batch to a file, atomically.

    Args:
        batch: any stage that is valid at level `"shapes"`; wrong values may be saved for inspection.
        path: the file, usually `*.npz`; an existing one is replaced.

    Raises:
        ContractError: the batch's fields are wrong, or its arrays cannot be read here.
        OSError: the file cannot be written.
    """
    import json
    from zipfile import ZIP_STORED, ZipFile, ZipInfo

    validate(batch)
    if not isinstance(path, str | os.PathLike) or "\0" in os.fsdecode(path):
        raise broken("argument", "path", "path", "the path of a file", describe(path))
    host = fetch(batch)
    arrays: dict[str, np.ndarray] = {}
    body = _encode(host, "", arrays)
    header = {"format": FORMAT, "version": "{}.{}".format(*VERSION), "stage": type(batch).__name__, "batch": body}
    target = os.fsdecode(path)
    folder, last = os.path.split(target)
    partial = os.path.join(folder, f".{last}.{os.urandom(16).hex()}.partial")
    try:
        with open(partial, "xb") as file:
            with ZipFile(file, "w", ZIP_STORED) as archive:
                archive.writestr(ZipInfo(_HEADER, _EPOCH), json.dumps(header, indent=1, allow_nan=False))
                for name, array in arrays.items():
                    member = io.BytesIO()
                    np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
                    archive.writestr(ZipInfo(f"{name}.npy", _EPOCH), member.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def load_batch(path: str | os.PathLike[str], *, level: str = "values") -> Any:
    """Read a batch from a file.

    Args:
        path: a file written by `save_batch` of this or an earlier minor version of the format.
        level: how far to validate it, as in `validate`.

    Returns:
        The Prompts, Rollout, Scored or TrainBatch, with read-only numpy arrays.

    Raises:
        ContractError: the file cannot be read, is not a batch, has an unknown version, or breaks a rule.
    """
    import json

    members = _members(path)
    try:
        header = json.loads(members.pop(_HEADER))
    except (ValueError, RecursionError) as error:
        raise broken("file", _HEADER, "json", "JSON text", error) from error
    stage, version = _read_header(header)
    arrays = {name.removesuffix(".npy"): _read_npy(name, data) for name, data in members.items()}
    batch = _decode(stage, header["batch"], version, arrays)
    if arrays:
        raise broken("file", min(arrays), "known", f"an array of a {stage.__name__}", "an unknown one")
    validate(batch, level)
    return batch


def _members(path: Any) -> dict[str, bytes]:
    """The members of the zip, which must be uncompressed: what is read is never larger than the file."""
    from zipfile import ZIP_STORED, BadZipFile, ZipFile

    try:
        path = os.fsdecode(path)
        status = os.stat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise broken("file", None, "readable", "a file", "a folder, a pipe or a device")
        with ZipFile(path) as archive:
            listed = archive.infolist()
            names = [info.filename for info in listed]
            if _HEADER not in names or len(set(names)) != len(names):
                raise broken("file", None, "members", f"a zip of {_HEADER} and arrays, without duplicate names", names)
            if any(info.compress_type != ZIP_STORED for info in listed):
                raise broken("file", None, "stored", "an uncompressed zip", "compressed members")
            if sum(info.file_size for info in listed) > size or archive.getinfo(_HEADER).file_size > _LONGEST_HEADER:
                raise broken("file", None, "size", "as long as its members say", f"{size} bytes")
            return {name: archive.read(name) for name in names}
    except ContractError:
        raise
    except (*_UNREADABLE, BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
        raise broken("file", None, "readable", "a complete zip file", reason) from error


def _read_header(header: Any) -> tuple[type[Stage], tuple[int, int]]:
    wanted = {"format", "version", "stage", "batch"}
    if not isinstance(header, dict) or set(header) != wanted:
        raise broken("file", _HEADER, "keys", f"an object with the keys {sorted(wanted)}", describe(header))
    if header["format"] != FORMAT:
        raise broken("file", "format", "format", repr(FORMAT), describe(header["format"]))
    text = header["version"]
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", text):
        raise broken("file", "version", "version", "'MAJOR.MINOR'", describe(text))
    major, minor = map(int, text.split("."))
    if major != VERSION[0] or minor > VERSION[1]:
        expected = f"{VERSION[0]}.0 to {VERSION[0]}.{VERSION[1]}"
        old = "Format 1 was never released: make the batch again and write it with `save_batch`."
        new = "Read it with the grpo-contracts that wrote it, or a later one."
        raise broken("file", "version", "version", expected, text, hint=old if major < VERSION[0] else new)
    stages = {stage.__name__: stage for stage in STAGES}
    if not isinstance(header["stage"], str) or header["stage"] not in stages:
        raise broken("file", "stage", "stage", f"one of {list(stages)}", describe(header["stage"]))
    return stages[header["stage"]], (major, minor)


def _read_npy(name: str, data: bytes) -> np.ndarray:
    """An array from a `.npy` member. Its header is matched against the one form that numpy writes, never evaluated."""
    start = 10 + int.from_bytes(data[8:10], "little")
    match = re.fullmatch(_NPY, data[10:start])
    if not name.endswith(".npy") or data[:8] != b"\x93NUMPY\x01\x00" or match is None:
        raise broken("file", name, "npy", "a version 1.0 .npy array of plain numbers", "something else")
    descr, fortran, dims = match.groups()
    shape = tuple(int(size) for size in dims.split(b",") if size.strip())
    try:
        dtype = np.dtype(descr.decode())
    except TypeError as error:
        raise broken("file", name, "npy", "of a dtype that numpy knows", error) from error
    wanted = prod(shape) * dtype.itemsize
    if len(data) - start != wanted:
        raise broken("file", name, "size", f"{wanted} bytes of data for shape {shape}", f"{len(data) - start}")
    flat = np.frombuffer(data, dtype, offset=start) if wanted else np.empty(0, dtype)
    try:
        return flat.reshape(shape, order="F" if fortran == b"True" else "C")
    except ValueError as error:  # 65 axes, or an empty array whose other axes are beyond all memory
        raise broken("file", name, "npy", "of a shape that numpy can make", error) from error


def _encode(stage: Stage, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON that mirrors a stage; its arrays are added to `arrays`."""
    body: dict[str, Any] = {}
    for field, spec in stage.specs().items():
        value = getattr(stage, field)
        if isinstance(value, Stage):
            body[field] = _encode(value, f"{prefix}{field}.", arrays)
        elif spec.dtype and value is not None:
            body[field] = {"array": prefix + field}
            arrays[prefix + field] = value
        elif isinstance(value, SamplingParams | PolicyVersion):
            body[field] = asdict(value)
        else:
            body[field] = value
    return body


def _decode(kind: type[Any], body: Any, version: tuple[int, int], arrays: dict[str, np.ndarray]) -> Any:
    """The stage, sampling parameters or policy version that `body` mirrors; its arrays are removed from `arrays`."""
    name = kind.__name__
    if not isinstance(body, dict):
        raise broken("file", name, "object", "a JSON object", describe(body))
    known = {field.name: field for field in fields(kind)}
    for key in body:
        if key not in known:
            raise broken("file", name, "known", f"an object with keys among {list(known)}", describe(key))
    specs = kind.specs() if issubclass(kind, Stage) else {}
    values = {}
    for field in known.values():
        if field.name not in body:
            # Only a field that is newer than the file may be missing from it.
            if version >= VERSION or field.default is MISSING:
                raise broken("file", f"{name}.{field.name}", "present", "in the header", "nothing")
            continue
        value = body[field.name]
        if field.name in NESTED:
            value = _decode(NESTED[field.name], value, version, arrays)
        elif field.name in specs and specs[field.name].dtype and value is not None:
            value = _take(f"{name}.{field.name}", value, arrays)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _take(field: str, reference: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    named = reference.get("array") if isinstance(reference, Mapping) else None
    if not isinstance(named, str) or named not in arrays:
        raise broken("file", field, "array", 'an object {"array": NAME} that names a member', describe(named))
    return arrays.pop(named)
