"""The optimizer and its learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings

__all__ = ["make_optimizer"]

_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "adam": optax.adam,
    "lion": optax.lion,
    "muon": muon,
    "adafactor": optax.adafactor,
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}


def make_optimizer(settings: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run.

    Args:
        settings: the section `optimizer`, and what decides how many updates there will be.

    Returns:
        The optimizer, and its learning rate as a function of the updates applied.

    Raises:
        ConfigError: an argument that the optimizer does not have, or a setting that it has no use for.
    """
    given = settings.optimizer
    schedule = _schedule(settings)
    make = _OPTIMIZERS[given.name]
    known = inspect.signature(make).parameters
    unknown = [name for name in given.arguments if name not in known or name == "learning_rate"]
    if unknown:
        names = ", ".join(name for name in known if name != "learning_rate")
        raise ConfigError(f"optimizer.arguments of {given.name} must be among {names}: got {', '.join(unknown)}")
    arguments: dict[str, Any] = {
        prefix + name: getattr(given, name)
        for name in ("b1", "b2")
        for prefix in ("", "adam_")
        if prefix + name in known
    }
    mask = _matrices if given.decay == "matrices" else None
    after: list[optax.GradientTransformation] = []
    match given.name:
        case "adamw" | "lion":
            arguments |= {"weight_decay": given.weight_decay, "mask": mask}
        case "muon" | "adafactor" if given.weight_decay:
            # optax's muon decays only what Muon moves, and its adafactor leaves the learning rate out of the decay.
            after = [optax.add_decayed_weights(lambda count: -given.weight_decay * schedule(count), mask)]
        case "adam" | "rmsprop" | "sgd" if given.weight_decay:
            raise ConfigError(
                f"optimizer.weight_decay is {given.weight_decay:g}, but {given.name} has no weight decay: set it to 0, "
                "or choose adamw, lion, muon or adafactor"
            )
    if given.name == "muon":
        arguments["muon_weight_dimension_numbers"] = _muon_axes
    if given.name == "rmsprop":
        arguments["decay"] = given.b2
    optimizer = make(schedule, **(arguments | given.arguments))
    return optax.chain(optimizer, *after) if after else optimizer, schedule


def _schedule(settings: Settings) -> optax.Schedule:
    given = settings.optimizer
    updates = given.decay_steps or settings.updates
    start = 0.0 if given.warmup_steps else given.learning_rate
    match given.schedule:
        case "constant":
            return optax.warmup_constant_schedule(start, given.learning_rate, given.warmup_steps)
        case "cosine":
            return optax.warmup_cosine_decay_schedule(
                start, given.learning_rate, given.warmup_steps, updates, given.end_learning_rate
            )
        case "linear":
            rise = optax.linear_schedule(start, given.learning_rate, max(1, given.warmup_steps))
            fall = optax.linear_schedule(
                given.learning_rate, given.end_learning_rate, max(1, updates - given.warmup_steps)
            )
            return optax.join_schedules([rise, fall], [given.warmup_steps])


def _matrices(params: Any) -> Any:
    """Which parameters are matrices: neither norms nor biases."""

    def is_matrix(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not name.endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _muon_axes(params: Any) -> Any:
    """Which axes of a stacked matrix Muon sums over and which come out; the leading axis, of layers, is a batch.

    Embeddings, norms and biases have none and go to Adam.

    Source: Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    inward, outward = MuonDimensionNumbers((1,), (2, 3)), MuonDimensionNumbers((1, 2), (3,))
    plain = MuonDimensionNumbers((1,), (2,))
    axes = {"q": inward, "k": inward, "v": inward, "o": outward, "gate": plain, "up": plain, "down": plain}
    return dict.fromkeys(params) | {"layers": {name: axes.get(name) for name in params["layers"]}}
