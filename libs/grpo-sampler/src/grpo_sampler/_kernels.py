"""Which attention kernel runs: plain XLA, cuDNN's fused kernel on GPUs, or splash attention on TPUs."""

import math
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grpo_sampler._attention import attend, causal_mask
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import SamplerError
from grpo_sampler._partition import BATCH_AXES, TENSOR_AXIS

Attention = Literal["xla", "cudnn", "splash"]
# Splash works on tiles whose size is a multiple of 128 lanes; its authors use 512 for both queries and keys.
_LANES, _TILE = 128, 512
# Matrix products in each of splash's kernels; the backward ones compute the logits a second time.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_CUDNN_HEAD_SIZE = 128


def resolve_attention(choice: str, config: ModelConfig, compute_dtype: jnp.dtype, mesh: Mesh | None) -> Attention:
    """Resolves `auto`, and refuses a kernel that cannot run the model.

    Args:
        choice: `auto`, `xla`, `cudnn` or `splash`. `auto` is splash on TPUs, cudnn on GPUs if type and head size
            allow it, and xla otherwise.
        config: the model.
        compute_dtype: type of queries, keys and values.
        mesh: the devices it will run on; None for jax's default device.

    Returns:
        The kernel that will run.

    Raises:
        SamplerError: no such choice, or cudnn with a type or head size that it has no kernel for.
    """
    allowed = get_args(Attention)
    if choice not in ("auto", *allowed):
        raise SamplerError(f"attention must be one of auto, {', '.join(allowed)}: got {choice!r}.")
    half = compute_dtype in (jnp.bfloat16, jnp.float16)
    fits_cudnn = half and config.head_size % 8 == 0 and config.head_size <= _CUDNN_HEAD_SIZE
    if choice == "auto":
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        if platform == "tpu" and (mesh is not None or jax.device_count() == 1):
            # XLA does not partition the kernel by itself, so several devices need a mesh.
            return "splash"
        return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "xla"
    if choice == "cudnn" and not fits_cudnn:
        raise SamplerError(
            "attention 'cudnn' must have compute_dtype bfloat16 or float16 and a head size that is a multiple of 8 up "
            f"to {_CUDNN_HEAD_SIZE}: got {compute_dtype.name} and {config.head_size}. Choose 'xla'."
        )
    return cast(Attention, choice)


def self_attention(
    choice: Attention,
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_BT: Int[Array, "B T"],
    mesh: Mesh | None = None,
) -> Float[Array, "B T H E"]:
    """Causal attention within segments, by the chosen kernel.

    Args:
        choice: from `resolve_attention`.
        q_BTHE: queries, unscaled.
        k_BTKE: keys.
        v_BTKE: values.
        segment_BT: segment of each token; 0 is padding.
        mesh: rows are split over dp and fsdp, heads over tp; splash needs it on more than one device. Inside a
            `shard_map` over the rows, only heads are split.

    Returns:
        Mixed values, in q's type.
    """
    if choice == "splash":
        return splash_attention(q_BTHE, k_BTKE, v_BTKE, segment_BT, mesh)
    return masked_attention(choice, q_BTHE, k_BTKE, v_BTKE, causal_mask(segment_BT))


def masked_attention(
    choice: Attention,
    q_BTHE: Float[Array, "B T H E"],
    k_BSKE: Float[Array, "B S K E"],
    v_BSKE: Float[Array, "B S K E"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H E"]:
    """Attention under any mask, by cuDNN or plain XLA; splash cannot take such masks.

    Args:
        choice: from `resolve_attention`.
        q_BTHE: queries, unscaled.
        k_BSKE: keys.
        v_BSKE: values.
        mask_BTS: True lets a query see a key; every query must see at least one.

    Returns:
        Mixed values, in q's type.
    """
    return (_cudnn if choice == "cudnn" else attend)(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


def splash_attention(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    segment_BT: Int[Array, "B T"],
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Splash attention: blockwise on TPU, never storing logits nor computing the upper half of the causal mask.

    Args:
        q_BTHE: queries, unscaled.
        k_BTKE: keys.
        v_BTKE: values.
        segment_BT: segment of each token; 0 is padding.
        mesh: see `self_attention`; axes that do not divide their dimension are ignored.
        interpret: run the kernel without a TPU, for tests.

    Returns:
        Mixed values, in q's type.

    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # Imported here because Pallas takes a second to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, _, E = q_BTHE.shape
    tile = _splash_tile(T)
    extra = -T % tile

    def local(q: Array, k: Array, v: Array, segment: Array) -> Array:
        length, heads = q.shape[1], q.shape[2]
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash_kernel.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile),
            interpret=interpret,
        )

        def row(q: Array, k: Array, v: Array, segment: Array) -> Array:
            return cast(Array, kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(segment, segment)))

        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(jax.vmap(row)(q, k, v, segment), 1, 2)

    scaled = (q_BTHE.astype(jnp.float32) / math.sqrt(E)).astype(q_BTHE.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (scaled, k_BTKE, v_BTKE))
    segment = jnp.pad(segment_BT.astype(jnp.int32), ((0, 0), (0, extra)))
    if mesh is not None:
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        rows = None if manual else dividing(mesh, BATCH_AXES, B)
        heads = dividing(mesh, (TENSOR_AXIS,), k_BTKE.shape[2])
        spec = PartitionSpec(rows, None, heads, None)
        local = jax.shard_map(
            local,
            mesh=None if manual else mesh,  # a nested shard_map takes the mesh from the outer one
            in_specs=(spec, spec, spec, PartitionSpec(rows, None)),
            out_specs=spec,
            axis_names=set(mesh.axis_names) - manual,
            check_vma=False,
        )
    return local(q, k, v, segment)[:, :T]


def splash_flops(kernel: str, *, rows: int, heads: int, head_size: int, length: int) -> float:
    """Floating-point operations of one call of a splash kernel, which XLA's cost analysis does not count.

    Args:
        kernel: name of the kernel in the compiled program, such as `splash_mha_fwd_segmented_residuals`.
        rows: rows on one device.
        heads: query heads on one device.
        head_size: size of a head.
        length: tokens of a row, before the kernel pads it to whole tiles.

    Returns:
        The operations of its matrix products on the causal half of all pairs of tokens; 0 for any other kernel.
    """
    ours = kernel.startswith("splash_")
    products = next((count for name, count in _SPLASH_PRODUCTS.items() if ours and name in kernel), 0)
    tile = _splash_tile(length)
    padded = math.ceil(length / tile) * tile
    return float(products * rows * heads * head_size * padded**2)


def _splash_tile(length: int) -> int:
    return min(_TILE, math.ceil(length / _LANES) * _LANES)


def _cudnn(q: Array, k: Array, v: Array, mask: Bool[Array, "B T S"]) -> Array:
    """cuDNN's backward pass needs even lengths, so odd ones are padded with a key and a query that nothing sees."""
    T = q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, T % 2), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (k, v))
    mask = jnp.pad(mask, ((0, 0), (0, q.shape[1] - T), (0, k.shape[1] - mask.shape[2])))
    # The added query sees the first key, because a row that sees nothing has no softmax.
    mask = mask.at[:, T:, 0].set(True)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")[:, :T]


def dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes that the mesh has, if together they divide the dimension."""
    present = tuple(axis for axis in axes if axis in mesh.shape)
    return present if present and size % math.prod(mesh.shape[axis] for axis in present) == 0 else None
