"""Where each parameter is in the Hugging Face layout: one table for loading and saving, and the check against it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_sampler._config import ModelConfig, check_config
from grpo_sampler._errors import WeightsError
from grpo_sampler._lora import adapter_shapes

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters, and the tensors of a checkpoint that make it up.

    Args:
        path: keys into the parameter tree.
        name: tensor name, with `{}` for the layer if the parameter is stacked.
        rows: our axes that a checkpoint flattens into the tensor's first axis.
        columns: likewise the second axis; empty for vectors.
        transposed: our axes are columns then rows (a linear layer's weight is stored output first).
        layers: length of the leading L axis, or None if the parameter is not stacked.
    """

    path: tuple[str, ...]
    name: str
    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    transposed: bool = False
    layers: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape, including the L axis."""
        single = self.columns + self.rows if self.transposed else self.rows + self.columns
        return single if self.layers is None else (self.layers, *single)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in a checkpoint."""
        rows, columns = math.prod(self.rows), math.prod(self.columns)
        return (rows, columns) if self.columns else (rows,)

    def tensor_names(self) -> list[str]:
        """The tensors that make up this parameter, in the order of layers."""
        return [self.name] if self.layers is None else [self.name.format(layer) for layer in range(self.layers)]

    def read(self, fetch: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """Reads a block of our parameter from one stored tensor, fetching only the rows and columns that it needs.

        Args:
            fetch: reads the stored tensor at a tuple of slices.
            index: slices into our axes, without the L axis.

        Returns:
            The block, a view of what was fetched.
        """
        ours = [slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape[-len(index) :])]
        at = len(self.columns) if self.transposed else len(self.rows)
        rows, columns = (ours[at:], ours[:at]) if self.transposed else (ours[:at], ours[at:])
        if not columns:
            block = fetch((_flat(rows, self.rows),))
            return block.reshape(_partial(rows, self.rows))[(slice(None), *rows[1:])]
        block = fetch((_flat(rows, self.rows), _flat(columns, self.columns)))
        block = block.reshape(_partial(rows, self.rows) + _partial(columns, self.columns))
        block = block[(slice(None), *rows[1:], slice(None), *columns[1:])]
        if not self.transposed:
            return block
        n = len(self.rows)
        return block.transpose(*range(n, block.ndim), *range(n))

    def stored(self, value: np.ndarray) -> np.ndarray:
        """Turns the parameter of one layer into the tensor of a checkpoint.

        Args:
            value: our array, without the L axis.

        Returns:
            A contiguous array of `stored_shape`.
        """
        if self.transposed:
            value = value.reshape(math.prod(self.columns), math.prod(self.rows)).T
        return np.ascontiguousarray(value.reshape(self.stored_shape))


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every parameter of a model.

    Args:
        config: the model.

    Returns:
        One `Leaf` per parameter, in a fixed order.
    """
    L, D, F, V = config.layers, config.width, config.mlp_width, config.vocab_size
    queries, keys = (config.query_heads, config.head_size), (config.kv_heads, config.head_size)

    def linear(ours: str, theirs: str, columns: tuple[int, ...], rows: tuple[int, ...]) -> Leaf:
        return Leaf(("layers", ours), f"model.layers.{{}}.{theirs}.weight", rows, columns, transposed=True, layers=L)

    def vector(ours: str, theirs: str, rows: tuple[int, ...]) -> Leaf:
        return Leaf(("layers", ours), f"model.layers.{{}}.{theirs}", rows, layers=L)

    table = [Leaf(("embed",), "model.embed_tokens.weight", (V,), (D,))]
    if not config.tied:
        table.append(Leaf(("unembed",), "lm_head.weight", (V,), (D,)))
    table += [
        Leaf(("final_norm",), "model.norm.weight", (D,)),
        vector("attn_norm", "input_layernorm.weight", (D,)),
        vector("mlp_norm", "post_attention_layernorm.weight", (D,)),
        linear("q", "self_attn.q_proj", (D,), queries),
        linear("k", "self_attn.k_proj", (D,), keys),
        linear("v", "self_attn.v_proj", (D,), keys),
        linear("o", "self_attn.o_proj", queries, (D,)),
        linear("gate", "mlp.gate_proj", (D,), (F,)),
        linear("up", "mlp.up_proj", (D,), (F,)),
        linear("down", "mlp.down_proj", (F,), (D,)),
    ]
    if config.qkv_bias:
        table += [
            vector("q_bias", "self_attn.q_proj.bias", queries),
            vector("k_bias", "self_attn.k_proj.bias", keys),
            vector("v_bias", "self_attn.v_proj.bias", keys),
        ]
    if config.qk_norm:
        table += [
            vector("q_norm", "self_attn.q_norm.weight", (config.head_size,)),
            vector("k_norm", "self_attn.k_norm.weight", (config.head_size,)),
        ]
    return table


def check_params(params: Any, config: ModelConfig) -> None:
    """Checks that parameters, or their shapes, are those of a model.

    Args:
        params: a plain nested dictionary of arrays or `jax.ShapeDtypeStruct`s.
        config: the model.

    Raises:
        SamplerError: `config` is not a ModelConfig.
        WeightsError: no such dictionary; a parameter that is missing, unexpected, misshaped or not floating.
    """
    check_config(config)
    if not isinstance(params, Mapping):
        raise WeightsError(
            f"params must be a nested dictionary of arrays: got a {type(params).__name__}. "
            "`graphdef, params = split(model)` takes them out of a network."
        )
    expected = {leaf.path: leaf for leaf in leaves(config)}
    for path, leaf in expected.items():
        name, value = "/".join(path), value_of(params, path)
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:
            raise WeightsError(f"params {name} must be an array: got a {type(value).__name__}.")
        if tuple(shape) != leaf.shape:
            raise WeightsError(
                f"params {name} must have shape {leaf.shape}: got {tuple(shape)}. Do they belong to this configuration?"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise WeightsError(f"params {name} must be of a floating type: got {dtype}.")
    for name, shape in adapter_shapes(config).items():
        value = value_of(params, ("layers", name))
        if tuple(value.shape) != (config.layers, *shape):
            raise WeightsError(
                f"params layers/{name} must have shape {(config.layers, *shape)}: got {tuple(value.shape)}. "
                "Do these adapters belong to this configuration?"
            )
    known = {"/".join(path) for path in expected} | {f"layers/{name}" for name in adapter_shapes(config)}
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    unexpected = [path for path in paths if path not in known]
    if unexpected:
        raise WeightsError(f"params must hold only the configuration's parameters: got also {listed(unexpected)}.")


def value_of(params: Any, path: tuple[str, ...]) -> Any:
    """The parameter at a path; raises a WeightsError if it is missing."""
    found: Any = params
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise WeightsError(f"params must hold {'/'.join(path)}: it is missing.")
        found = found[key]
    return found


def listed(names: list[str]) -> str:
    """The first five of some names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _flat(parts: list[slice], sizes: tuple[int, ...]) -> slice:
    """The stored range that contains the slice of the first axis; inner axes are read whole and cut afterwards."""
    inner = math.prod(sizes[1:])
    return slice(parts[0].start * inner, parts[0].stop * inner)


def _partial(parts: list[slice], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (parts[0].stop - parts[0].start, *sizes[1:])
