"""The README's third task, word for word: it resolves its settings and builds a run."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from grpo_countdown.task import TASK
from grpo_trainer import cli

APP = Path(__file__).parents[1]


@pytest.fixture
def doubling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package that the README tells to write, importable, with what installing it would record."""
    blocks = re.findall(r"```(?:python|toml|yaml)\n# (\S+)\n(.*?)```", (APP / "README.md").read_text(), re.DOTALL)
    assert [name.rpartition(".")[2] for name, _ in blocks] == ["py", "toml", "yaml"]
    for name, text in blocks:
        file = tmp_path / Path(name).relative_to("apps/doubling")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    requires = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    monkeypatch.syspath_prepend(tmp_path / "src")
    import grpo_doubling.task  # pyright: ignore[reportMissingImports]

    yield grpo_doubling.task
    for name in [name for name in sys.modules if name.startswith("grpo_doubling")]:
        del sys.modules[name]


def test_its_pins_are_those_of_this_app(doubling: ModuleType) -> None:
    assert doubling.__file__ is not None
    theirs = tomllib.loads((Path(doubling.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ours = tomllib.loads((APP / "pyproject.toml").read_text())["project"]
    assert sorted(theirs["dependencies"]) == sorted(ours["dependencies"])


def test_it_prints_its_settings(doubling: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(doubling.TASK, ["train", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "functions: [correct]" in printed
    assert "max_new_tokens: 8" in printed


def test_it_judges(doubling: ModuleType) -> None:
    train, test = (doubling.TASK.problems("embedded", split, 0) for split in ("train", "test"))
    assert not {problem.question for problem in train} & {problem.question for problem in test}
    assert len(doubling.TASK.problems("embedded", "train", 5)) == 5
    assert doubling.TASK.judge(test[0].answer, test[0], finished=True).strict
    assert not doubling.TASK.judge("twelve", test[0], finished=True).strict


def test_it_builds_a_run(doubling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = f"model.path={TASK.policies['embedded']}"
    assert cli.main(doubling.TASK, ["train", "--dry-run", "--set", policy, "cpu_devices=0", f"run.dir={tmp_path}"]) == 0
    assert "everything is valid and built" in capsys.readouterr().out
