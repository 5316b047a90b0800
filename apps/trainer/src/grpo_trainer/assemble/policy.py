"""Which policy: the folder of its weights, and its dimensions without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from grpo_sampler import LoRA, ModelConfig, init_adapters, load_adapters
from grpo_trainer.data.hub import HubError, download, is_hub_id
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings

__all__ = ["check_same_model", "first_adapters", "lora_of", "model_config", "policy_folder"]

_SHIPPED = Path(__file__).parent / "model_configs"
# The forward pass reads none of these.
_FREE = ("bos_id", "eos_ids", "max_positions")


def policy_folder(setting: str, path: str, shipped: Mapping[str, Path]) -> Path:
    """Find a policy; a Hub id is downloaded.

    Args:
        setting: key that the path was given under, for errors.
        path: name of a policy that ships with the task, a folder, or a Hub id.
        shipped: the task's own policies.

    Returns:
        A folder in Hugging Face layout.

    Raises:
        ConfigError: there is no such folder, or the download failed.
    """
    if path in shipped:
        return shipped[path]
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if not is_hub_id(path):
        names = "".join(f"`{name}`, " for name in shipped)
        raise ConfigError(
            f"{setting} must be {names}a folder, or a Hub id such as Qwen/Qwen2.5-0.5B: got {path!r}. "
            f"There is no folder {Path(path).expanduser().absolute()}"
        )
    try:
        return download(path, "model", ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    except HubError as error:
        raise ConfigError(f"{setting}={path!r} is not a local folder, and {error}") from error


def model_config(path: str, shipped: Mapping[str, Path]) -> ModelConfig:
    """The dimensions of a policy, without its weights and without the network.

    Args:
        path: name of a policy that ships with the task, a folder, or the Hub id of a model whose dimensions come with
            the trainer.
        shipped: the task's own policies.

    Returns:
        The configuration.

    Raises:
        ConfigError: another Hub id.
    """
    if path in shipped:
        return ModelConfig.from_file(shipped[path])
    if Path(path).expanduser().is_dir():
        return ModelConfig.from_file(Path(path).expanduser())
    known = re.fullmatch(r"(?:Qwen|meta-llama)/((?:Qwen2\.5|Llama-3\.2)-[\d.]+B)(-Instruct)?", path)
    file = _SHIPPED / f"{known[1].lower()}.json" if known else None
    if file is None or not file.is_file():
        names = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.json")))
        raise ConfigError(
            f"preflight knows the dimensions of {names} without the network: got model.path={path!r}. For another "
            "model, put its config.json into a folder and set model.path to the folder; no weights are needed"
        )
    return ModelConfig.from_file(file)


def check_same_model(path: str, reference: ModelConfig, model: ModelConfig) -> None:
    """Refuse a reference policy that cannot go through the policy's own forward pass.

    Args:
        path: of the reference, for the error.
        reference: its dimensions.
        model: the policy's.

    Raises:
        ConfigError: they differ; names every difference.
    """
    ours, theirs = asdict(model), asdict(reference)
    pairs = {name: (theirs[name], ours[name]) for name in ours if name not in _FREE}
    differing = [f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]
    if differing:
        raise ConfigError(
            "loss.reference must be the same kind of model as the policy, since they share one forward pass: "
            f"{path} has {'; '.join(differing)}"
        )


def lora_of(settings: Settings) -> LoRA | None:
    """The adapters that the settings ask for, or None where all parameters are trained."""
    lora = settings.model.lora
    if not lora.rank:
        return None
    return LoRA(lora.rank, lora.alpha or lora.rank, lora.targets, lora.rank_stabilized)


def first_adapters(settings: Settings, model: ModelConfig, placed: Any) -> Any:
    """Adapters before the first step: new ones that change nothing, or those of `model.lora.adapter`.

    Args:
        settings: the section `model`; new adapters start from `seed`.
        model: the policy, with its adapters.
        placed: shardings, a tree like the adapters.

    Returns:
        The adapters, on their devices.

    Raises:
        GrpoError: the adapters of the folder are damaged, or not those that the settings describe.
    """
    folder = settings.model.lora.adapter
    if not folder:
        return jax.jit(partial(init_adapters, model, seed=settings.seed), out_shardings=placed)()
    found, adapters = load_adapters(Path(folder).expanduser(), replace(model, lora=None))
    if found != model.lora:
        raise ConfigError(
            f"model.lora must describe the adapters of model.lora.adapter={folder!r}: they have rank {found.rank}, "
            f"alpha {found.alpha:g}, targets {list(found.targets)}, rank_stabilized {found.rank_stabilized}"
        )
    return jax.device_put(adapters, placed)
