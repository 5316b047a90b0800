"""The contract as data, for readers in other languages: stages, fields, rules and the file's header."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ._file import FORMAT, VERSION
from ._provenance import FinishReason, PolicyVersion, SamplingParams
from ._rules import RULES
from ._stages import OPTIONAL, STAGES, Stage
from ._validate import NESTED

AXES = {"P": "prompts", "B": "sequences", "T": "token positions", "N": "reward functions"}
_SAMPLING = {
    "temperature": {"type": "number", "minimum": 0},
    "top_k": {"type": "integer", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "stop_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}
_VERSION = {
    "step": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31},
    "digest": {"type": "string", "pattern": "^[0-9a-f]*$"},
}


def schema() -> dict[str, Any]:
    """The contract as plain data.

    Returns:
        A JSON-ready dictionary: `format`, `version`, `axes`, `finish_reasons`, `stages` (fields and rules of each) and
        `header`, a JSON Schema (2020-12) of a file's `header.json`.
    """
    return {
        "format": FORMAT,
        "version": "{}.{}".format(*VERSION),
        "container": "uncompressed zip of header.json and one version 1.0 .npy member per array",
        "axes": AXES,
        "finish_reasons": {reason.name: reason.value for reason in FinishReason},
        "stages": {stage.__name__: _stage(stage) for stage in STAGES},
        "header": _header(),
    }


def _stage(stage: type[Stage]) -> dict[str, Any]:
    entries = {}
    for field, spec in stage.specs().items():
        entry: dict[str, Any] = {"doc": spec.doc}
        if spec.dtype:
            entry |= {"dtype": spec.dtype, "dims": [dims.split() for dims in spec.dims.split("|")]}
            entry["optional"] = field in OPTIONAL
        else:
            entry["type"] = NESTED[field].__name__ if field in NESTED else ("names" if field == "names" else "integer")
        entries[field] = entry
    rules = [{"field": r.field, "rule": r.name, "expected": r.expected} for r in RULES if r.stage is stage]
    return {"fields": entries, "rules": rules}


def _header() -> dict[str, Any]:
    definitions: dict[str, Any] = {
        "array": _object({"array": {"type": "string", "description": "name of the member without .npy"}}),
        "SamplingParams": _object({field.name: _SAMPLING[field.name] for field in fields(SamplingParams)}),
        "PolicyVersion": _object({field.name: _VERSION[field.name] for field in fields(PolicyVersion)}),
    }
    for stage in STAGES:
        definitions[stage.__name__] = _object({field: _json_type(stage, field) for field in stage.specs()})
    branches = [
        {"properties": {"stage": {"const": stage.__name__}, "batch": {"$ref": f"#/$defs/{stage.__name__}"}}}
        for stage in STAGES
    ]
    whole = _object({"format": {"const": FORMAT}, "version": {"type": "string"}, "stage": {}, "batch": {}})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": definitions,
        **whole,
        "oneOf": branches,
    }


def _json_type(stage: type[Stage], field: str) -> dict[str, Any]:
    if stage.specs()[field].dtype:
        array = {"$ref": "#/$defs/array"}
        return {"oneOf": [array, {"type": "null"}]} if field in OPTIONAL else array
    if field in NESTED:
        return {"$ref": f"#/$defs/{NESTED[field].__name__}"}
    if field == "names":
        return {"type": "array", "items": {"type": "string", "minLength": 1}, "uniqueItems": True}
    return {"type": "integer"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
