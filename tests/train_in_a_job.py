"""One process of the jobs in `test_many_hosts.py`: makes or trains a toy policy, and keeps gradients and weights."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import grpo_mesh
from grpo_contracts import PolicyVersion
from grpo_gsm8k.embedded.tokenizer import texts
from grpo_gsm8k.task import TASK
from grpo_sampler import ModelConfig, Transformer, save_pretrained, split
from grpo_trainer.assemble import Run, assemble
from grpo_trainer.assemble.teach import make_tokenizer
from grpo_trainer.learn import make_batch, place, updates
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.run.checkpoint import Checkpoints
from grpo_trainer.settings import layers
from grpo_trainer.train import fit, sample, train


def share_of_digits(*, completions: list[str], **_: Any) -> list[float | None]:
    """A reward that a random policy already gets now and then."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def make_policy(folder: Path) -> None:
    folder.mkdir()
    architecture = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "vocab_size": make_tokenizer(folder, texts()[:600]),
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(architecture))
    model = ModelConfig.from_file(folder)
    save_pretrained(folder, model, split(Transformer(model, rngs=nnx.Rngs(0)))[1])


def run(job: grpo_mesh.Job, assignments: list[str]) -> None:
    settings = layers.load(TASK, [], assignments)
    if code := train(settings, TASK):
        grpo_mesh.abort(code, "training did not finish")
    run = assemble(settings, TASK)
    keep(job, Path(settings.run.dir) / "gradient.npz", first_gradient(run))
    restored = Checkpoints.reader(Path(settings.run.dir) / "checkpoints").restore(run.state, run.identity)
    assert restored is not None
    keep(job, Path(settings.run.dir) / "weights.npz", restored.state.params)


def first_gradient(run: Run) -> Any:
    """Of the first step's loss, before it is clipped: the metrics tell its norm alone."""
    params = run.state.params
    batch = next(run.problems)
    rollout = sample(run, params, batch, PolicyVersion(0, grpo_mesh.digest(params)))
    scored = run.rewards.score(rollout, transcribe(rollout, batch.problems, run.tokenizer))
    packed = next(updates(run, params, make_batch(run, params, scored), 0))
    gradient, terms = run.plan.gradient(params, place(run, packed))
    return jax.tree.map(lambda leaf: leaf / terms.denominator, gradient)


def hang(job: grpo_mesh.Job, assignments: list[str]) -> None:
    """Trains until the last rank never comes back from its first update."""
    run = assemble(layers.load(TASK, [], assignments), TASK)
    if job.rank == job.processes - 1:
        run = replace(run, plan=replace(run.plan, update=lambda *_: time.sleep(600)))
    fit(run)


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
