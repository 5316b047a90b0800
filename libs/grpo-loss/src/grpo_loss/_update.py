"""One optimizer step from many micro-batches: accumulate sums, divide once, clip, check, apply.

The number of live micro-batches is read at run time, so one compiled program serves every fill of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from grpo_loss._errors import LossError
from grpo_loss._layout import MicroBatch, PackedBatch
from grpo_loss._terms import LossTerms

Params: TypeAlias = Any
Forward: TypeAlias = Callable[[Params, MicroBatch], tuple[Array, Array]]
Loss: TypeAlias = Callable[[Array, Array, MicroBatch], LossTerms]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update reads and replaces.

    Args:
        params: Parameters as the network and the sampler take them.
        opt_state: State of the optimizer; its moments are float32 whatever the parameters' type.
        step: Optimizer steps applied.
        skipped: Updates refused because something was not finite, or nothing was there to learn from.
        master: float32 copy of the parameters that the optimizer moves; None where ``params`` are exact enough.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    master: Params | None = None


def init_state(params: Params, optimizer: optax.GradientTransformation, *, master: bool | None = None) -> TrainState:
    """The state before the first update.

    Args:
        params: Parameters. The first update donates them, so pass a copy if you keep using them.
        optimizer: Any optax optimizer.
        master: Keep a float32 copy that the optimizer moves, and round ``params`` from it. None: where a parameter
            has fewer than 32 bits, since a step of 1e-6 is lost when added to a bfloat16 number.

    Returns:
        The state, at step 0.
    """
    if master is None:
        master = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(params))
    wide = jax.tree.map(_wide, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(wide), zero, zero + 0, wide if master else None)


def accumulate(
    forward: Forward, loss: Loss, params: Params, batch: PackedBatch, *, param_shardings: Params | None = None
) -> tuple[Params, LossTerms]:
    """Gradient of the loss's numerator and all its terms, added over the live micro-batches; nothing is divided.

    Args:
        forward: ``(params, micro) -> (logp_RT, entropy_RT)``.
        loss: ``(logp_RT, entropy_RT, micro) -> LossTerms``.
        params: What to differentiate in.
        batch: Micro-batches; only the first ``batch.count`` are computed.
        param_shardings: Sharding of every parameter, to keep the running sums sharded alike. Left to the compiler if
            None.

    Returns:
        Gradient of the numerator (float32, or float64 for float64 parameters), and the terms.
    """

    def numerator(params: Params, micro: MicroBatch) -> tuple[Array, LossTerms]:
        terms = loss(*forward(params, micro), micro)
        return terms.numerator, terms

    def pinned(gradient: Params) -> Params:
        return gradient if param_shardings is None else lax.with_sharding_constraint(gradient, param_shardings)

    def body(i: Array, carry: tuple[Params, LossTerms]) -> tuple[Params, LossTerms]:
        gradient, terms = carry
        micro = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batch.micro)
        new_gradient, new_terms = jax.grad(numerator, has_aux=True)(params, micro)
        gradient = jax.tree.map(lambda total, new: total + new.astype(total.dtype), gradient, new_gradient)
        return pinned(gradient), terms + new_terms

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.micro)
    _, shapes = jax.eval_shape(numerator, params, first)
    no_gradient = pinned(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params))
    no_terms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.fori_loop(0, batch.count, body, (no_gradient, no_terms))


def make_update(
    forward: Forward,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float | None = 1.0,
    param_shardings: Params | None = None,
) -> jax.stages.Wrapped:
    """A compiled update: one optimizer step from a batch of any fill. The state it is given is donated.

    A loss, gradient or change that is not finite leaves parameters, moments and ``step`` bit for bit as they were and
    adds one to ``skipped``; so does a batch without a token that counts.

    Args:
        forward: ``(params, micro) -> (logp_RT, entropy_RT)`` of one micro-batch.
        loss: ``(logp_RT, entropy_RT, micro) -> LossTerms`` of one micro-batch. Whatever it needs beside them comes in
            ``micro.data``.
        optimizer: Any optax optimizer; it sees float32 gradients and parameters. Schedules count applied steps. Traced
            twice an update, for the change and for its state: XLA drops of each what only the other needs.
        max_grad_norm: Largest Euclidean norm of the whole gradient; longer ones are scaled down. None: no limit.
        param_shardings: Sharding of every parameter; see `accumulate`.

    Returns:
        ``update(state, batch) -> (state, metrics)``, a `jax.jit` function. Metrics are scalars over the whole batch:
        the loss's own, ``loss``, ``grad_norm`` (before clipping), ``update_norm``, ``finite`` (0 or 1) and
        ``denominator``.

    Raises:
        LossError: ``max_grad_norm`` is not positive.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise LossError(f"max_grad_norm must be positive: got {max_grad_norm}. Use None for no limit.")

    def update(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, Array]]:
        gradient, terms = accumulate(forward, loss, state.params, batch, param_shardings=param_shardings)
        scale = 1 / jnp.where(terms.denominator > 0, terms.denominator, 1)
        grad_norm = optax.tree.norm(gradient) * scale
        if max_grad_norm is not None:
            scale *= jnp.minimum(1.0, max_grad_norm / jnp.maximum(grad_norm, jnp.finfo(grad_norm.dtype).tiny))
        before = jax.tree.map(_wide, state.params) if state.master is None else state.master

        def optimized(scale: Array) -> tuple[Params, optax.OptState]:
            scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient)
            return optimizer.update(scaled, state.opt_state, before)

        change, _ = optimized(scale)
        update_norm = optax.tree.norm(change)
        finite = jnp.isfinite(terms.numerator) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        apply = finite & (terms.denominator > 0)
        # Asked again for the moments alone, which wait for all of the change: so XLA computes them where the old ones
        # lie, with neither copies of the old nor all of the new ones beside them.
        _, opt_state = optimized(jnp.where(apply, scale, 0))
        after = optax.apply_updates(before, change)

        def chosen(new: Params, old: Params) -> Params:
            return jax.tree.map(lambda n, o: jnp.where(apply, n.astype(o.dtype), o), new, old)

        new_state = TrainState(
            params=chosen(after, state.params),
            opt_state=chosen(opt_state, state.opt_state),
            step=state.step + apply,
            skipped=state.skipped + ~apply,
            master=None if state.master is None else chosen(after, state.master),
        )
        metrics = terms.means() | {
            "loss": terms.loss(),
            "denominator": terms.denominator,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(apply, update_norm, 0),
            "finite": finite.astype(jnp.float32),
        }
        return new_state, metrics

    return jax.jit(update, donate_argnums=0)


def make_score(forward: Forward) -> jax.stages.Wrapped:
    """A compiled scoring pass: old or reference log-probabilities of a packed batch.

    Args:
        forward: As for `make_update`.

    Returns:
        ``score(params, batch) -> (logp_MRT, entropy_MRT)``, a `jax.jit` function; 0 in micro-batches that are not
        live. ``batch.with_data(old_logp=logp_MRT)`` keeps them for the update, `unpack_tokens` gives ``[B, T]``.
    """

    def score(params: Params, batch: PackedBatch) -> tuple[Array, Array]:
        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            micro = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batch.micro)
            new = forward(params, micro)
            logp_MRT, entropy_MRT = (
                lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(carry, new, strict=True)
            )
            return logp_MRT, entropy_MRT

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.micro)
        shapes = jax.eval_shape(forward, params, first)
        empty = tuple(jnp.zeros((batch.micro.tokens_RT.shape[0], *x.shape), x.dtype) for x in shapes)
        return lax.fori_loop(0, batch.count, body, empty)

    return jax.jit(score)


def warmup_cosine(peak: float, *, warmup_steps: int, steps: int, end: float = 0.0) -> optax.Schedule:
    """Learning rate that rises linearly from 0 to its peak, then falls along a half cosine.

    Args:
        peak: Highest learning rate, reached at optimizer step ``warmup_steps``.
        warmup_steps: Optimizer steps of the rise; 0 starts at the peak.
        steps: Optimizer steps in all (rollouts x epochs x minibatches), at which ``end`` is reached.
        end: Last learning rate.

    Returns:
        Function of the number of optimizer steps applied.

    Raises:
        LossError: The warm-up is negative or not shorter than the whole.
    """
    if not 0 <= warmup_steps < steps:
        raise LossError(f"0 <= warmup_steps < steps must hold: got warmup_steps={warmup_steps}, steps={steps}.")
    start = 0.0 if warmup_steps else peak
    return optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, steps, end)


def constant(rate: float, *, warmup_steps: int = 0) -> optax.Schedule:
    """Constant learning rate, after an optional linear rise from 0.

    Args:
        rate: The learning rate, reached at optimizer step ``warmup_steps``.
        warmup_steps: Optimizer steps of the rise.

    Returns:
        Function of the number of optimizer steps applied.

    Raises:
        LossError: The warm-up is negative.
    """
    if warmup_steps < 0:
        raise LossError(f"warmup_steps must be at least 0: got {warmup_steps}.")
    return optax.warmup_constant_schedule(0.0 if warmup_steps else rate, rate, warmup_steps)


def _wide(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
