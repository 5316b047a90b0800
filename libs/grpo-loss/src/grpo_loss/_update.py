"""One optimizer step from many micro-batches: accumulate sums, divide once, clip, check, apply.

The number of live micro-batches is read at run time, so one compiled program serves every fill of a batch.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from grpo_loss._errors import LossError
from grpo_loss._layout import Forward, FrozenForward, MicroBatch, PackedBatch, Params, apply_to_micro, in_rows
from grpo_loss._terms import Loss, LossTerms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update reads and replaces.

    Args:
        params: parameters as the network and the sampler take them.
        opt_state: state of the optimizer; its moments are float32 whatever the parameters' type.
        step: optimizer steps applied.
        skipped: updates refused because something was not finite, or there was nothing to learn from.
        master: float32 copy of the parameters that the optimizer moves; None where `params` are exact enough.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    master: Params | None = None


@runtime_checkable
class Update(Protocol):
    """A compiled update, from `make_update`: a `jax.jit` function that donates its state."""

    def __call__(self, state: TrainState, batch: PackedBatch, *frozen: Params) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step: the new state, and scalar metrics by name."""
        ...

    def lower(self, state: TrainState, batch: PackedBatch, *frozen: Params) -> jax.stages.Lowered:
        """The program for these shapes (arrays or `jax.ShapeDtypeStruct`), to compile ahead of time."""
        ...


@runtime_checkable
class Score(Protocol):
    """A compiled scoring pass, from `make_score`: a `jax.jit` function."""

    def __call__(self, params: Params, batch: PackedBatch, *frozen: Params) -> tuple[Array, Array]:
        """Log-probabilities and entropies [M, R, T]."""
        ...

    def lower(self, params: Params, batch: PackedBatch, *frozen: Params) -> jax.stages.Lowered:
        """The program for these shapes (arrays or `jax.ShapeDtypeStruct`), to compile ahead of time."""
        ...


def init_state(params: Params, optimizer: optax.GradientTransformation, *, master: bool | None = None) -> TrainState:
    """The state before the first update.

    Args:
        params: floating-point parameters. The first update donates them, so pass a copy if you keep using them.
        optimizer: any optax optimizer.
        master: keep a float32 copy that the optimizer moves, and round `params` from it. None: where a parameter
            has fewer than 32 bits, since a step of 1e-6 is lost when added to a bfloat16 number.

    Returns:
        The state, at step 0.

    Raises:
        LossError: the arguments are exchanged, or a parameter is not a floating-point array.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise LossError(
            f"optimizer must be an optax.GradientTransformation: got a {type(optimizer).__name__}. "
            "Call init_state(params, optimizer)."
        )
    if not jax.tree.leaves(params):
        raise LossError("params must hold at least one array: got an empty tree.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise LossError(
                f"params must be floating-point arrays: got {getattr(leaf, 'dtype', type(leaf).__name__)} at "
                f"{jax.tree_util.keystr(path)}. Keep integers outside the parameters."
            )
    if master is None:
        master = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(params))
    wide = jax.tree.map(_wide, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(wide), zero, zero + 0, wide if master else None)


def accumulate(
    forward: Forward | FrozenForward,
    loss: Loss,
    params: Params,
    batch: PackedBatch,
    *frozen: Params,
    param_shardings: Params | None = None,
) -> tuple[Params, LossTerms]:
    """Gradient of the loss's numerator and all its terms, added over the live micro-batches; nothing is divided.

    Args:
        forward: `(params, micro) -> (logp_RT, entropy_RT)`, in nats.
        loss: `(logp_RT, entropy_RT, micro) -> LossTerms`.
        params: what to differentiate in.
        batch: micro-batches; only the first `batch.count` are computed. `batch.idle` starts the denominator.
        frozen: what `forward` reads besides, such as the base of low-rank adapters; passed on, never differentiated.
        param_shardings: sharding of every parameter, to keep the running sums sharded alike. None leaves it to the
            compiler.

    Returns:
        Gradient of the numerator (float32, or float64 for float64 parameters), and the terms.

    Raises:
        LossError: `forward` or `loss` returns something else.
    """

    def numerator(params: Params, micro: MicroBatch) -> tuple[Array, LossTerms]:
        terms = loss(*_forward(forward, params, micro, *frozen), micro)
        if not isinstance(terms, LossTerms):
            raise LossError(
                f"loss must return LossTerms, as `policy_loss` does: got a {type(terms).__name__}. Return the sum and "
                "what to divide it by, LossTerms(numerator, denominator, {})."
            )
        return terms.numerator, terms

    def pinned(gradient: Params) -> Params:
        return gradient if param_shardings is None else lax.with_sharding_constraint(gradient, param_shardings)

    def body(i: Array, carry: tuple[Params, LossTerms]) -> tuple[Params, LossTerms]:
        gradient, terms = carry

        # Added within the branch of its size: added behind it, all branches would end in a second gradient in memory.
        def add(micro: MicroBatch) -> tuple[Params, LossTerms]:
            new_gradient, new_terms = jax.grad(numerator, has_aux=True)(params, micro)
            total = jax.tree.map(lambda total, new: total + new.astype(total.dtype), gradient, new_gradient)
            return pinned(total), terms + new_terms

        return apply_to_micro(add, batch, i)

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.micro)
    _, shapes = jax.eval_shape(numerator, params, first)
    no_gradient = pinned(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params))
    no_terms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    idle = jnp.asarray(batch.idle, no_terms.denominator.dtype)
    no_terms = replace(no_terms, denominator=no_terms.denominator + idle)
    return lax.fori_loop(0, batch.count, body, (no_gradient, no_terms))


def make_update(
    forward: Forward | FrozenForward,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    max_grad_norm: float | None = 1.0,
    param_shardings: Params | None = None,
) -> Update:
    """A compiled update: one optimizer step from a batch of any fill. The state it is given is donated.

    A loss, gradient or change that is not finite leaves parameters, moments and `step` bit for bit as they were and
    adds one to `skipped`; so does a batch without a token that counts.

    Args:
        forward: `(params, micro, *frozen) -> (logp_RT, entropy_RT)` of one micro-batch, in nats.
        loss: `(logp_RT, entropy_RT, micro) -> LossTerms` of one micro-batch; `make_loss` makes one.
        optimizer: any optax optimizer; it sees float32 gradients and parameters. Schedules count applied steps. It is
            traced twice per update, for the change and for its state, and XLA drops the unused half of each.
        max_grad_norm: largest Euclidean norm of the whole gradient; longer ones are scaled down. None: no limit.
        param_shardings: sharding of every parameter; see `accumulate`.

    Returns:
        `update(state, batch, *frozen) -> (state, metrics)`, a `jax.jit` function; `frozen` goes to `forward`. Metrics
        are scalars over the whole batch: the loss's own, `loss`, `grad_norm` (before clipping), `update_norm`, `finite`
        (0 or 1) and `denominator`.

    Raises:
        LossError: `max_grad_norm` is not positive; from the update itself: its arguments, or what `forward` or `loss`
            returns, are not what they must be.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise LossError(f"max_grad_norm must be positive: got {max_grad_norm}. Use None for no limit.")

    def update(state: TrainState, batch: PackedBatch, *frozen: Params) -> tuple[TrainState, dict[str, Array]]:
        if not isinstance(state, TrainState):
            raise LossError(
                f"state must be a TrainState: got a {type(state).__name__}. init_state(params, optimizer) makes one."
            )
        gradient, terms = accumulate(forward, loss, state.params, batch, *frozen, param_shardings=param_shardings)
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
        # Run the optimizer a second time for its state only; the data dependency on `apply` lets XLA update the moments
        # in place, without copies of the old ones or a second set of new ones.
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


def make_score(forward: Forward | FrozenForward) -> Score:
    """A compiled scoring pass: old or reference log-probabilities of a packed batch.

    Args:
        forward: as for `make_update`.

    Returns:
        `score(params, batch, *frozen) -> (logp_MRT, entropy_MRT)`, a `jax.jit` function; 0 in micro-batches that are
        not live.
        `iterate_minibatches` takes the first as old log-probabilities; `unpack_tokens` gives `[B, T]`.

    Raises:
        LossError: from the pass itself: `forward` returns something else.
    """

    def score(params: Params, batch: PackedBatch, *frozen: Params) -> tuple[Array, Array]:
        shape = batch.micro.tokens_RT.shape[1:]

        def scored(micro: MicroBatch) -> tuple[Array, Array]:
            logp_RT, entropy_RT = _forward(forward, params, micro, *frozen)
            return in_rows(logp_RT, shape, batch.shards), in_rows(entropy_RT, shape, batch.shards)

        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            new = apply_to_micro(scored, batch, i)
            logp_MRT, entropy_MRT = (
                lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(carry, new, strict=True)
            )
            return logp_MRT, entropy_MRT

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.micro)
        shapes = jax.eval_shape(lambda params, micro: _forward(forward, params, micro, *frozen), params, first)
        empty = tuple(jnp.zeros((batch.micro.tokens_RT.shape[0], *x.shape), x.dtype) for x in shapes)
        return lax.fori_loop(0, batch.count, body, empty)

    return jax.jit(score)


def _forward(forward: Any, params: Params, micro: MicroBatch, *frozen: Params) -> tuple[Array, Array]:
    """What `forward` returns, checked: one array alone would be taken apart by rows."""
    result: Any = forward(params, micro, *frozen)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise LossError(
            f"forward must return (logp_RT, entropy_RT), as `token_logp` does: got a {type(result).__name__}."
        )
    return result[0], result[1]


def _wide(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
