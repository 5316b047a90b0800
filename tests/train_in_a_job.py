"""One process of the jobs in `test_many_hosts.py`: makes or trains a toy policy, and keeps gradients and weights."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import grpo_mesh
from grpo_contracts import PolicyVersion, TrainBatch
from grpo_trainer import train as training
from grpo_trainer.assemble.run import Assembly, assemble
from grpo_trainer.run.checkpoint import Checkpoints
from runs import load
from grpo_trainer.learn import advantages, place, updates
from grpo_gsm8k.embedded.tokenizer import make_tokenizer
from grpo_sampler import ModelConfig, Transformer, save_pretrained, split


def share_of_digits(*, completions: list[str], **_: Any) -> list[float | None]:
    """A reward that a random policy already gets now and then."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def make_policy(folder: Path) -> None:
    folder.mkdir()
    vocabulary = make_tokenizer(folder, problems=300)
    architecture = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocabulary,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(architecture))
    model = ModelConfig.from_file(folder)
    save_pretrained(folder, model, split(Transformer(model, rngs=nnx.Rngs(0)))[1])


def run(job: grpo_mesh.Job, settings: list[str]) -> None:
    config = load([], settings)
    if code := training.train(config):
        grpo_mesh.leave(code, "training did not finish")
    assembled = assemble(config)
    keep(job, Path(config.run.dir) / "gradient.npz", first_gradient(assembled))
    restored = Checkpoints(Path(config.run.dir) / "checkpoints", keep=1).restore(assembled.state, assembled.identity)
    assert restored is not None
    keep(job, Path(config.run.dir) / "weights.npz", restored.state.params)


def first_gradient(assembled: Assembly) -> Any:
    """Of the first step's loss, before it is clipped: the metrics tell its norm alone."""
    config, params = assembled.config, assembled.state.params
    asked, policy = next(assembled.problems), PolicyVersion(0, grpo_mesh.digest(params))
    rollout = assembled.sampler.generate(
        params, asked.prompts, group_size=config.rollout.group_size, seed=config.seed, step=0, policy=policy
    )
    scored = assembled.rewards.score(rollout, asked)
    batch = TrainBatch(scored, advantages(scored, config))
    packed = next(updates(assembled, params, batch, 0))
    gradient, terms = assembled.gradient(params, place(assembled, packed))
    return jax.tree.map(lambda leaf: leaf / terms.denominator, gradient)


def hang(job: grpo_mesh.Job, settings: list[str]) -> None:
    """Trains until the last rank never comes back from its first update."""
    if job.rank == job.processes - 1:
        training.__dict__["learn"] = lambda *_: time.sleep(600)
    training.train(load([], settings))


def keep(job: grpo_mesh.Job, file: Path, tree: Any) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(grpo_mesh.to_host(tree))[0]
    if job.rank == 0:
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        np.savez(file, **dict(zip(names, (leaf for _, leaf in leaves))))


if __name__ == "__main__":
    # Only here: the processes that compute rewards import this module too, and are no members of the job.
    this_job = grpo_mesh.initialize(heartbeat=30, timeout=120)
    if sys.argv[1] == "make-policy":
        make_policy(Path(sys.argv[2]))
    elif sys.argv[1] == "hang":
        hang(this_job, sys.argv[2:])
    else:
        run(this_job, sys.argv[1:])
