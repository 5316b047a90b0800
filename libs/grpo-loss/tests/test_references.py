"""Values and gradients equal verl's, TRL's and tunix's on a ragged batch (stored by the scripts in oracles/)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_loss_laws import values

import grpo_loss

FOLDER = Path(__file__).parent / "oracles"
# TRL keeps SAPO's temperatures in float32, verl adds 1e-8 to lengths, tunix computes in float32 whatever it is given.
TOLERANCE = {"torch_references.npz": 5e-7, "tunix_references.npz": 2e-6}


def _names():
    for file in TOLERANCE:
        with np.load(FOLDER / file) as stored:
            arguments = json.loads(str(stored["arguments"]))
        for name in arguments:
            yield pytest.param(file, name, arguments[name], id=name)


def _close(actual, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64) / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("file", "name", "arguments"), list(_names()))
def test_equals_the_reference(file, name, arguments):
    arguments = dict(arguments)
    with np.load(FOLDER / file) as stored, jax.enable_x64(True):
        batch = {key.removeprefix("batch/"): stored[key] for key in stored if key.startswith("batch/")}
        stored = {key.removeprefix(f"{name}/"): stored[key] for key in stored if key.startswith(f"{name}/")}
        call = arguments.pop("call")
        if call == "policy_loss":
            _check_loss(batch, stored, TOLERANCE[file], **arguments)
        else:
            _close(_advantage(call, batch, arguments), stored["value"], TOLERANCE[file])


def _check_loss(batch, stored, tolerance, *, advantage=True, weight=False, **arguments):
    @jax.jit
    def compiled(logp, entropy):
        terms = grpo_loss.policy_loss(
            logp,
            old_logp_RT=jnp.asarray(batch["old"]),
            # KL alone is compared with the advantages at zero.
            advantage_RT=jnp.asarray(batch["advantage"])[:, None] * advantage * (batch["weights"] if weight else 1),
            mask_RT=jnp.asarray(batch["mask"]),
            reference_logp_RT=jnp.asarray(batch["reference"]),
            entropy_RT=entropy,
            **values(grpo_loss, **arguments),
        )
        return terms.loss()

    both = jax.value_and_grad(compiled, argnums=(0, 1))(jnp.asarray(batch["logp"]), jnp.asarray(batch["entropy"]))
    value, (gradient, entropy_gradient) = both
    _close(value, stored["value"], tolerance)
    _close(gradient, stored["gradient"], tolerance)
    if "entropy_gradient" in stored:
        _close(entropy_gradient, stored["entropy_gradient"], tolerance)


def _advantage(call, batch, arguments):
    mask = batch["mask"]
    if call == "gae returns":
        return grpo_loss.gae(batch["token_reward"], batch["value"], mask, **arguments)[1]
    if call == "reinforce_plus_plus_advantage":
        return grpo_loss.reinforce_plus_plus_advantage(batch["token_reward"], mask, whitened=False, **arguments)
    return getattr(grpo_loss, call)(batch["reward"], **arguments)
