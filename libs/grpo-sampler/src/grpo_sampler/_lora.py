"""Low-rank adapters: which matrices have one, their shapes and start, and how they are taken apart and merged.

The adapter of a matrix W is two matrices A and B of rank r, and the block computes x W + scale (x A) B. They stand
beside their matrix in `params["layers"]`, as `q_a` and `q_b` beside `q`, with the leading axis L and W's own axes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_sampler._errors import SamplerError

if TYPE_CHECKING:
    from grpo_sampler._config import ModelConfig

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_SUFFIXES = ("_a", "_b")
Params = dict[str, Any]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of a network.

    Args:
        rank: columns of A and rows of B.
        alpha: the product A B is scaled by alpha / rank.
        targets: matrices of every block that have an adapter, of `q k v o gate up down`.
        rank_stabilized: scale by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly.

    Raises:
        SamplerError: a rank below 1, a scale that is not positive, or a matrix that is not there.

    Source: LoRA arXiv:2106.09685; rsLoRA arXiv:2312.03732.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = MATRICES
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise SamplerError(f"rank must be a whole number of at least 1: got {self.rank!r}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise SamplerError(f"alpha must be positive: got {self.alpha!r}.")
        unknown = [name for name in self.targets if name not in MATRICES]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise SamplerError(f"targets must be some of {', '.join(MATRICES)}, each once: got {list(self.targets)}.")

    @property
    def scale(self) -> float:
        """What the product A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def adapter_shapes(config: "ModelConfig") -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters of one block by name, without the leading L axis; empty without adapters."""
    if config.lora is None:
        return {}
    sides = {name: _sides(name, config) for name in config.lora.targets}
    rank = (config.lora.rank,)
    return {
        name + suffix: (inputs + rank if suffix == "_a" else rank + outputs)
        for name, (inputs, outputs) in sides.items()
        for suffix in _SUFFIXES
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of a block is half of an adapter."""
    return name[:-2] in MATRICES and name[-2:] in _SUFFIXES


def initial_adapter(name: str, shape: tuple[int, ...], key: Array) -> Float[Array, "*shape"]:
    """A as a linear layer of PyTorch starts; B zero, so that the network starts as it would without adapters."""
    if name.endswith("_b"):
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / math.sqrt(math.prod(shape[1:-1]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def init_adapters(config: "ModelConfig", *, seed: int) -> Params:
    """Adapters that change nothing yet.

    Args:
        config: the model, with `lora`.
        seed: of the random A.

    Returns:
        `{"layers": {"q_a": [L, D, r], "q_b": [L, r, H, E], ...}}`, float32.

    Raises:
        SamplerError: a configuration without `lora`.
    """
    _check_lora(config)
    return {
        "layers": {
            name: initial_adapter(name, (config.layers, *shape), jax.random.fold_in(jax.random.key(seed), n))
            for n, (name, shape) in enumerate(adapter_shapes(config).items())
        }
    }


def split_adapters(params: Mapping[str, Any]) -> tuple[Params, Params]:
    """Take adapters out of a network's parameters.

    Args:
        params: with adapters.

    Returns:
        (base, adapters): parameters without adapters, and the adapters alone.
    """
    layers = params["layers"]
    base = {name: leaf for name, leaf in layers.items() if not is_adapter(name)}
    adapters = {name: leaf for name, leaf in layers.items() if is_adapter(name)}
    return {**params, "layers": base}, {"layers": adapters}


def join_adapters(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Params:
    """Put adapters beside their matrices: the parameters of a network with `lora`. Copies nothing.

    Args:
        base: parameters without adapters.
        adapters: from `init_adapters`, `split_adapters` or `load_adapters`.

    Returns:
        Parameters for a `Transformer`, a `Sampler` or `merge_adapters`.
    """
    return {**base, "layers": {**base["layers"], **adapters["layers"]}}


def merge_adapters(params: Mapping[str, Any], config: "ModelConfig") -> Params:
    """Add every adapter to its matrix: W + scale A B, computed in float32 and rounded once to W's type.

    A network with these parameters computes the same as one with adapters, up to the rounding of W, which is at most
    2^-9 of each weight for bfloat16 and 2^-24 for float32.

    Args:
        params: with adapters; without any they are returned as they are.
        config: the model, with `lora`.

    Returns:
        Parameters without adapters.
    """
    base, adapters = split_adapters(params)
    if not adapters["layers"]:
        return base
    _check_lora(config)
    scale = config.lora.scale if config.lora else 0.0

    def merged(parts: tuple[Array, Array, Array]) -> Array:
        weight, a, b = parts
        rank = b.shape[0]
        wide = [part.astype(jnp.float32) for part in (a.reshape(-1, rank), b.reshape(rank, -1))]
        change = jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + scale * change.reshape(weight.shape)).astype(weight.dtype)

    layers = dict(base["layers"])
    for name in dict.fromkeys(name[:-2] for name in adapters["layers"]):
        parts = layers[name], adapters["layers"][f"{name}_a"], adapters["layers"][f"{name}_b"]
        layers[name] = jax.lax.map(merged, parts)  # one layer at a time: of all, the change would fill another network
    return {**base, "layers": layers}


def _sides(name: str, config: "ModelConfig") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a block's matrix that are summed over, and those that it gives."""
    D, F, E = config.width, config.mlp_width, config.head_size
    queries, keys = (config.query_heads, E), (config.kv_heads, E)
    return {
        "q": ((D,), queries),
        "k": ((D,), keys),
        "v": ((D,), keys),
        "o": (queries, (D,)),
        "gate": ((D,), (F,)),
        "up": ((D,), (F,)),
        "down": ((F,), (D,)),
    }[name]


def _check_lora(config: "ModelConfig") -> None:
    if config.lora is None:
        raise SamplerError("config must have lora: got None. Use dataclasses.replace(config, lora=LoRA(rank, alpha)).")
