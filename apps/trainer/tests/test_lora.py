"""Runs that train adapters: the base stays as it is, checkpoints are small, and a resume is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy import TASK, load, metrics, settings

from grpo_mesh import digest
from grpo_sampler import load_adapters, load_pretrained, merge_adapters, save_adapters
from grpo_trainer.assemble import assemble
from grpo_trainer.cli import main
from grpo_trainer.run.checkpoint import Checkpoints, ResumeRefused
from grpo_trainer.run.folder import versions
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.train import fit, train

LORA = ("model.lora.rank=4", "model.lora.alpha=8", "optimizer.learning_rate=2e-2", "checkpoint.every=2", "steps=4")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def restored(given: Any) -> Any:
    run = assemble(given, TASK)
    kept = Checkpoints(Path(given.run.dir) / "checkpoints", keep=9, versions=versions("grpo-toy"))
    found = kept.restore(run.state, run.identity)
    assert found is not None
    return run, found.state


@pytest.fixture(scope="module")
def trained(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    given = settings(toy_policy, tmp_path_factory.mktemp("lora") / "run", *LORA)
    assert train(given, TASK) == 0
    return given


def test_only_adapters_are_trained_and_kept(trained: Any, toy_policy: Path, tmp_path: Path) -> None:
    run, state = restored(trained)
    assert set(state.params) == {"layers"}
    assert all(name.endswith(("_a", "_b")) for name in state.params["layers"])
    assert np.abs(np.asarray(state.params["layers"]["down_b"])).max() > 0
    assert run.identity["parameters"] == digest(run.frozen[0])
    lines = metrics(Path(trained.run.dir))
    # The adapters are still nothing: what samples and what scores are the base, to the last bit of the ratio.
    assert lines[0]["importance_ratio/max"] == 1
    assert all(line["sampling_logp_difference/max"] < 1e-4 for line in lines)
    full = settings(toy_policy, tmp_path / "full", *LORA[2:])
    assert train(full, TASK) == 0
    assert metrics(tmp_path / "full")[0]["reward"] == lines[0]["reward"]
    assert metrics(tmp_path / "full")[0]["entropy"] == pytest.approx(lines[0]["entropy"], rel=1e-6)


def test_a_resume_is_exact(trained: Any, toy_policy: Path, tmp_path: Path) -> None:
    given = settings(toy_policy, tmp_path / "torn", *LORA)
    run = assemble(given, TASK)

    class Killed(BaseException):
        pass

    left = [3]

    def update(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return run.plan.update(*arguments)

    kept = Checkpoints(tmp_path / "torn" / "checkpoints", keep=9, versions=versions("grpo-toy"))
    with pytest.raises(Killed):
        fit(replace(run, plan=replace(run.plan, update=update)), checkpoints=kept)
    kept.close()
    assert train(given, TASK) == 0
    assert metrics(tmp_path / "torn") == metrics(Path(trained.run.dir))
    assert digest(restored(given)[1]) == digest(restored(trained)[1])


def test_another_base_is_refused(trained: Any) -> None:
    run, _ = restored(trained)
    kept = Checkpoints(Path(trained.run.dir) / "checkpoints", keep=9, versions=versions("grpo-toy"))
    with pytest.raises(ResumeRefused, match="parameters"):
        kept.restore(run.state, run.identity | {"parameters": "of another base"})


def test_the_reference_is_the_base_without_a_copy(toy_policy: Path, tmp_path: Path) -> None:
    given = settings(toy_policy, tmp_path / "kl", *LORA, "loss.reference=initial", "loss.kl_coefficient=0.1")
    run = assemble(given, TASK)
    assert set(run.reference) == {"layers"}
    assert train(given, TASK) == 0
    kl = [line["kl"] for line in metrics(tmp_path / "kl")]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[-1] > 1e-6


def test_adapters_of_peft_are_gone_on_from(trained: Any, toy_policy: Path, tmp_path: Path) -> None:
    run, state = restored(trained)
    save_adapters(tmp_path / "adapter", run.plan.model, jax.device_get(state.params), base=str(toy_policy))
    more = (*LORA, f"model.lora.adapter={tmp_path / 'adapter'}")
    again = assemble(settings(toy_policy, tmp_path / "again", *more), TASK)
    jax.tree.map(np.testing.assert_array_equal, again.state.params, state.params)
    assert again.identity["adapters"] != run.identity["adapters"]
    with pytest.raises(ConfigError, match="rank 4, alpha 8"):
        assemble(settings(toy_policy, tmp_path / "again", *more, "model.lora.rank=2"), TASK)


def test_a_run_with_adapters_is_exported_merged_and_as_adapters(trained: Any, tmp_path: Path) -> None:
    run, state = restored(trained)
    assert main(TASK, ["export", str(trained.run.dir), str(tmp_path / "out")]) == 0
    config, params = load_pretrained(tmp_path / "out")
    expected = merge_adapters(run.network(state.params), run.plan.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), params, expected)
    lora, adapters = load_adapters(tmp_path / "out" / "adapter", config)
    assert lora == run.plan.model.lora
    jax.tree.map(np.testing.assert_array_equal, adapters, state.params)


def test_eval_measures_a_run_with_adapters(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(TASK, ["export", str(trained.run.dir), str(tmp_path / "out")]) == 0
    assert main(TASK, ["eval", str(trained.run.dir), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "0 won, 0 lost" in said.replace(":", "")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.lora.alpha=8"], r"model\.lora\.rank is 0"),
        (["model.lora={rank: 4, targets: []}"], r"model\.lora\.targets must name at least one"),
        (["model.lora.rank=4", "model.lora.targets=[q, x]"], r"model\.lora\.targets must be"),
        (["model.lora.rang=4"], r"nearest valid key is 'model\.lora\.rank'"),
        (["model.lora=4"], "is a section"),
        (["model.lora.rank=4", "loss.reference=base", "loss.kl_coefficient=1"], "must be `initial` or `none`"),
    ],
)
def test_nonsense_is_refused(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([], sets)


def test_sets_of_one_section_add_up() -> None:
    lora = load([], ["model.lora={rank: 4, targets: [q, v]}", "model.lora.alpha=16"]).model.lora
    assert (lora.rank, lora.alpha, lora.targets) == (4, 16, ("q", "v"))
