"""The README's examples run as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from grpo_loss_ragged import VOCABULARY, WIDTH, ragged

from grpo_loss import PackShape


def test_examples_run():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    gradient, objective, training = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(gradient, names)
    assert np.isfinite(names["value"])
    assert names["gradient_BT"].shape == (4, 6)
    assert not np.asarray(names["gradient_BT"])[~np.asarray(names["mask_BT"])].any()
    # Inside the clip range a token with a positive advantage pulls its log-probability up.
    assert np.asarray(names["gradient_BT"])[0, 0] < 0

    exec(objective, names)
    terms = names["policy_loss"](
        jnp.zeros((4, 6)),
        advantage_RT=names["advantage_BT"],
        mask_RT=names["mask_BT"],
        objective=names["squared_ratio"],
    )
    assert np.isfinite(terms.loss())

    exec(training, names)
    data = ragged(1, 4, 4, 6, 9)
    params = {
        "embed": jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH)),
        "position": jax.random.normal(jax.random.key(1), (16, WIDTH)),
    }
    shape = PackShape.for_rollout(sequences=16, groups=4, max_prompt_length=6, max_new_tokens=9, rows=4)
    scored = data.train_batch().scored
    state, metrics = names["train"](params, scored, shape)
    # Rewards are all zero here: nothing to learn from, but every step is finite and counted.
    assert (int(state.step), float(metrics["finite"])) == (4, 1.0)
    check_forward(names["forward"], data, shape)


def check_forward(forward, data, shape):
    """The README's forward gives each token the same log-probability whoever else is in the row."""
    params = {
        "embed": jax.random.normal(jax.random.key(2), (VOCABULARY, WIDTH)),
        "position": jax.random.normal(jax.random.key(3), (16, WIDTH)),
    }

    def scores(packed):
        found = {}
        for m in range(int(packed.count)):
            micro = jax.tree.map(lambda x, m=m: jnp.asarray(x[m]), packed.micro)
            logp_RT = np.asarray(forward(params, micro)[0])
            where = np.asarray(micro.source_RT) >= 0
            found.update(zip(np.asarray(micro.source_RT)[where].tolist(), logp_RT[where].tolist(), strict=True))
        return found

    packed, padded = scores(data.pack(shape)), scores(data.pad(4))
    assert packed.keys() == padded.keys()
    np.testing.assert_allclose([packed[key] for key in padded], list(padded.values()), atol=1e-4)
