"""The random batch that every implementation is given, and results stored beside the arguments that match them."""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
GROUP_SIZE = 4


def batch():
    """Right-padded ragged arrays [B, T] in float64, two groups of four; off-policy enough for every bound to bind."""
    rng = np.random.default_rng(20261123)
    rows, width = 2 * GROUP_SIZE, 12
    length = rng.integers(1, width + 1, rows)
    mask = np.arange(width) < length[:, None]
    logp = -rng.exponential(1.0, (rows, width))
    reward = np.round(rng.normal(0, 1, rows), 3)
    return {
        "mask": mask,
        "logp": logp,
        "old": logp + rng.normal(0, 0.3, (rows, width)),
        "reference": logp + rng.normal(0, 0.3, (rows, width)),
        "entropy": rng.exponential(1.0, (rows, width)),
        "weights": rng.random((rows, width)) * 2,
        "advantage": rng.normal(0, 1, rows),
        "reward": reward,
        "rewards": np.stack([reward, np.round(rng.normal(0, 2, rows), 3)], axis=1),
        "value": rng.normal(0, 1, (rows, width)),
        "token_reward": np.where(mask, rng.normal(0, 1, (rows, width)), 0),
    }


class Store:
    """Collects results by name, each with the arguments of ours that must reproduce it, and writes one npz."""

    def __init__(self, versions):
        self.arrays = {f"batch/{name}": array for name, array in batch().items()}
        self.arguments = {}
        self.arrays["versions"] = np.array(json.dumps(versions))

    def loss(self, name, value, gradient, entropy_gradient=None, **arguments):
        self.arguments[name] = {"call": "policy_loss", **arguments}
        self.arrays[f"{name}/value"], self.arrays[f"{name}/gradient"] = np.asarray(value), np.asarray(gradient)
        if entropy_gradient is not None:
            self.arrays[f"{name}/entropy_gradient"] = np.asarray(entropy_gradient)

    def advantage(self, name, value, call, **arguments):
        self.arguments[name] = {"call": call, **arguments}
        self.arrays[f"{name}/value"] = np.asarray(value)

    def write(self, file):
        np.savez_compressed(FOLDER / file, arguments=np.array(json.dumps(self.arguments)), **self.arrays)
        print(f"{len(self.arguments)} results written to {FOLDER / file}")
