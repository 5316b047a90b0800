"""GSM8K's presets and its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import load

from grpo_gsm8k import cli
from grpo_gsm8k.task import TASK
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.layers import DEFAULTS, dump, load_saved, preset_files

SMOLLM2 = "smollm2-135m"
LARGE = sorted({*preset_files(TASK)} - {DEFAULTS, SMOLLM2})


def test_the_presets() -> None:
    full = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"]
    adapters = ["qwen2.5-1.5b-lora", "qwen2.5-3b-lora", "qwen2.5-7b-lora"]
    assert sorted(["llama-3.2-1b", *full, *adapters]) == LARGE
    assert SMOLLM2 in preset_files(TASK)


@pytest.mark.parametrize("name", preset_files(TASK))
def test_presets_are_valid_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    settings = load([name])
    (tmp_path / "saved.yaml").write_text(dump(settings))
    assert load([str(tmp_path / "saved.yaml")]) == load_saved(tmp_path / "saved.yaml") == settings


@pytest.mark.parametrize("name", LARGE)
def test_every_large_preset_names_its_slice_and_the_true_data(name: str) -> None:
    settings = load([name])
    assert settings.slices
    assert settings.data.source == "openai/gsm8k"
    assert settings.model.path.lower().rpartition("/")[2] == f"{name.removesuffix('-lora')}-instruct"
    # An update of 1e-6 rounds away in bfloat16 parameters; adapters are float32 beside a base of any type.
    assert settings.model.dtype == ("bfloat16" if settings.model.lora.rank else "float32")
    assert bool(settings.model.lora.rank) == name.endswith("-lora")
    assert settings.model.compute_dtype == "bfloat16"


def test_laptop_is_the_default_and_needs_nothing_else() -> None:
    settings = load(["laptop"])
    assert settings == load()
    assert (settings.model.path, settings.data.source) == ("embedded", "embedded")
    assert dict(zip(settings.reward.functions, settings.reward.weights)) == {"answer": 1.0, "format": 0.1}


def test_only_policies_that_were_not_taught_gsm8k_are_told_what_to_write() -> None:
    assert load().prompt.instruction == ""
    for name in LARGE:
        assert load([name]).prompt.instruction == TASK.instruction
    # Words alone do not make a model of this size write `#### n`: solved problems show it the form instead.
    small = load([SMOLLM2])
    assert (small.prompt.instruction, small.prompt.examples) == ("", 2)
    assert all("####" in problem.answer for problem in TASK.problems(small.data.source, "train", 2))


def test_the_tasks_own_rewards_are_named_where_another_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"must hold `answer`, .*`format` or module:function: got 'answr'"):
        load([], ["reward.functions=[answr]"])


def test_print_config_is_light() -> None:
    """It imports nothing that takes a second to load: so it answers at once, also on a busy machine."""
    script = (
        "import sys\nfrom grpo_gsm8k.cli import main\ncode = main(['train', '--print-config', '--set', 'steps=7'])\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'numpy', 'orbax', 'grain', 'optax'} & set(sys.modules)\n"
        "sys.stderr.write(','.join(sorted(heavy)))\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == dump(load([], ["steps=7"]))


def test_help_names_the_commands_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "eval", "replay", "warmstart", "make-data", "make-tokenizer"))


def test_errors_name_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--set", "step=3"]) == 2
    assert capsys.readouterr().err.startswith("grpo-gsm8k: error: --set: unknown key 'step'")
