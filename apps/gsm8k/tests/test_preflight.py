"""Preflight of GSM8K's own presets and policy; the programs are compared with the steps that a run takes."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import assemble, load, small

from grpo_contracts import PolicyVersion
from grpo_gsm8k import cli
from grpo_gsm8k.task import TASK
from grpo_mesh import find_slice, parse_mesh
from grpo_trainer.assemble.policy import model_config
from grpo_trainer.assemble.preflight.command import TOLERANCE, preflight
from grpo_trainer.assemble.preflight.programs import programs
from grpo_trainer.learn import make_batch, updates
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.settings.layers import DEFAULTS, preset_files
from grpo_trainer.train import sample

PRESETS = [name for name in preset_files(TASK) if name != DEFAULTS]


@pytest.mark.parametrize(("name", "slice_name"), [(name, each) for name in PRESETS for each in load([name]).slices])
def test_every_preset_divides_on_its_slices(name, slice_name):
    settings = load([name])
    sizes = parse_mesh(settings.mesh, find_slice(slice_name).chips)
    assert model_config(settings.model.path, TASK.policies).kv_heads % sizes["tp"] == 0
    assert settings.loss.rows % (sizes["dp"] * sizes["fsdp"]) == 0


def test_an_unknown_slice_is_refused_on_the_command_line(capsys):
    assert cli.main(["preflight", "--config", "qwen2.5-7b", "--slice", "v5e-3"]) == 2
    assert "choose one of v5e-1, v5e-4" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scored(toy_policy, tmp_path_factory):
    run = assemble(small(toy_policy, tmp_path_factory.mktemp("run")))
    batch = next(run.problems)
    rollout = sample(run, run.state.params, batch, PolicyVersion(0, ""))
    return run.rewards.score(rollout, transcribe(rollout, batch.problems, run.tokenizer))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("loss.minibatches=2", "loss.epochs=2"),
        ("loss.reference=initial", "loss.kl_coefficient=0.1"),
        ("loss.reference=initial", "loss.kl_coefficient=0.1", "loss.kl=k1", "loss.kl_in=reward"),
        ("loss.top_entropy=0.5",),
    ],
)
def test_scoring_and_update_are_those_of_a_step(toy_policy, scored, tmp_path, more):
    run = assemble(small(toy_policy, tmp_path, *more))
    scores = Recorder(run.plan.score)
    counted, params = replace(run, plan=replace(run.plan, score=scores)), run.state.params
    batches = list(updates(counted, params, make_batch(counted, params, scored), 0))

    lowered = Recorder(None)
    scoring, update = programs(replace(run.plan, score=lowered, update=lowered), phases=("scoring", "update"))
    assert (scoring.runs, update.runs) == (len(scores.arguments), len(batches))
    scoring.lower()
    update.lower()
    (_, score_batch), (_, update_batch) = lowered.arguments
    assert shapes(update_batch) == shapes(batches[0])
    if scores.arguments:
        assert shapes(score_batch) == shapes(scores.arguments[0][1])


class Recorder:
    """A jitted function that keeps its arguments, whether it is called or lowered."""

    def __init__(self, function):
        self.function, self.arguments = function, []

    def __call__(self, *arguments):
        self.arguments.append(arguments)
        return self.function(*arguments)

    def lower(self, *arguments):
        self.arguments.append(arguments)
        return self


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(leaf), leaf.dtype) for leaf in leaves]


@pytest.mark.slow
def test_the_update_s_predicted_memory_is_near_what_is_measured_on_this_machine(capsys):
    preflight(load([], ["cpu_devices=0", "mesh=dp:1"]), TASK)
    printed = capsys.readouterr().out
    error = re.search(r"^update .*error ([+-][\d.]+)%$", printed, re.MULTILINE)
    assert error
    assert abs(float(error[1])) / 100 <= TOLERANCE
    assert "rollout   predicted" in printed
