"""Adapters in the layout of the package peft: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import WeightsError
from grpo_sampler._layout import listed
from grpo_sampler._lora import MATRICES, LoRA, Params, adapter_shapes
from grpo_sampler._weights import write_tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
# What peft may do besides, and this library does not: each must be absent, false, empty or as given here.
_UNSUPPORTED: Mapping[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "lora_bias": False,
}


def save_adapters(
    folder: str | os.PathLike[str], config: ModelConfig, adapters: Mapping[str, Any], *, base: str = ""
) -> None:
    """Write adapters as peft reads them.

    Args:
        folder: created if necessary.
        config: the model, with `lora`.
        adapters: from `init_adapters` or `split_adapters`, readable by numpy on this process.
        base: name or path of the base model, for adapter_config.json.

    Raises:
        WeightsError: a configuration without `lora`, or adapters that are not those of the configuration.
    """
    lora = config.lora
    if lora is None:
        raise WeightsError("config must have lora, to save adapters: got None.")
    shapes = {name: (config.layers, *shape) for name, shape in adapter_shapes(config).items()}
    found = {name: tuple(leaf.shape) for name, leaf in adapters["layers"].items()}
    if found != shapes:
        raise WeightsError(f"adapters must have the shapes {shapes}: got {found}.")
    tensors = {}
    for name in lora.targets:
        a_LNr = np.asarray(adapters["layers"][f"{name}_a"], np.float32).reshape(config.layers, -1, lora.rank)
        b_LrN = np.asarray(adapters["layers"][f"{name}_b"], np.float32).reshape(config.layers, lora.rank, -1)
        for layer in range(config.layers):
            tensors[_tensor(name, layer, "A")] = np.ascontiguousarray(a_LNr[layer].T)
            tensors[_tensor(name, layer, "B")] = np.ascontiguousarray(b_LrN[layer].T)
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [_MODULES[name].rpartition(".")[2] for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, target / _WEIGHTS)
    (target / _CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_adapters(folder: str | os.PathLike[str], config: ModelConfig) -> tuple[LoRA, Params]:
    """Read adapters that peft or `save_adapters` wrote.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the base model.

    Returns:
        (lora, adapters): float32; `dataclasses.replace(config, lora=lora)` is the model that they belong to.

    Raises:
        WeightsError: no such files, a kind of adapter that this library does not compute, or tensors that are missing,
            unexpected, misshaped or not finite.
    """
    source = Path(folder)
    try:
        facts = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(source / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{source} must hold {_CONFIG} and {_WEIGHTS}: {error}") from error
    lora = _lora(facts, source)
    with_lora = replace(config, lora=lora)
    layers: dict[str, Any] = {}
    for name, shape in adapter_shapes(with_lora).items():
        target, half = name[:-2], name[-1].upper()
        flat = (lora.rank, int(np.prod(shape[:-1]))) if half == "A" else (int(np.prod(shape[1:])), lora.rank)
        parts = []
        for layer in range(config.layers):
            tensor = tensors.pop(_tensor(target, layer, half), None)
            if tensor is None or tensor.shape != flat:
                got = "none" if tensor is None else str(tensor.shape)
                raise WeightsError(f"{_tensor(target, layer, half)} in {source} must have shape {flat}: got {got}.")
            parts.append(tensor.astype(np.float32).T.reshape(shape))
        layers[name] = jnp.asarray(np.stack(parts))
        if not np.isfinite(parts).all():
            raise WeightsError(f"{name} in {source} must be finite: it holds NaN or infinity.")
    if tensors:
        raise WeightsError(
            f"{source} must hold only adapters of {list(lora.targets)}: got also {listed(list(tensors))}."
        )
    return lora, {"layers": layers}


def _lora(facts: Any, source: Path) -> LoRA:
    if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
        raise WeightsError(f"{source / _CONFIG} must have peft_type LORA: got {facts!r:.100}.")
    bad = {key: facts[key] for key, usual in _UNSUPPORTED.items() if facts.get(key) not in (usual, None, False, {}, [])}
    if bad:
        raise WeightsError(f"{source / _CONFIG} asks for what this library does not compute: {bad}.")
    modules = facts.get("target_modules")
    targets = (
        MATRICES
        if modules == "all-linear"
        else tuple(name for name in MATRICES if isinstance(modules, list) and f"{name}_proj" in modules)
    )
    if modules != "all-linear" and (not isinstance(modules, list) or len(targets) < len(modules)):
        known = ", ".join(f"{name}_proj" for name in MATRICES)
        raise WeightsError(f"target_modules in {source / _CONFIG} must be some of {known}: got {modules!r:.200}.")
    try:
        return LoRA(int(facts["r"]), float(facts["lora_alpha"]), targets, bool(facts.get("use_rslora", False)))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{source / _CONFIG} must give r and lora_alpha: {error}") from error


def _tensor(name: str, layer: int, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_MODULES[name]}.lora_{half}.weight"
