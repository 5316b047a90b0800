"""The command line: nothing heavy before a config is valid, and errors as sentences with exit codes."""

import json
import os
import subprocess
import sys
import types

import pytest

from grpo_contracts import ContractError, GrpoError
from grpo_gsm8k import cli
from grpo_trainer.settings import startup
from grpo_trainer.settings.errors import ConfigError
from runs import load
from grpo_trainer.settings.layers import dump
from grpo_trainer.settings.schema import Settings


@pytest.fixture
def quiet_environment(monkeypatch):
    """prepare_process() writes to the environment, or to a jax that other tests use: give it neither."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    heard = ("JAX_", "XLA_", "GLIBC_TUNABLES")
    monkeypatch.setattr(os, "environ", {name: v for name, v in os.environ.items() if not name.startswith(heard)})


@pytest.fixture
def train(monkeypatch, quiet_environment, tmp_path):
    """A stand-in for the training loop that does what it is told."""
    calls = []

    def install(action=lambda config, **options: 0):
        def run(config, **options):
            calls.append((config, options))
            return action(config, **options)

        module = types.ModuleType("grpo_trainer.train")
        module.train = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "grpo_trainer.train", module)
        return calls

    return install


def raising(error):
    def action(config, **options):
        raise error

    return action


def test_print_config_is_light():
    """It imports nothing that takes a second to load: so it answers at once, also on a busy machine."""
    script = (
        "import sys\nfrom grpo_gsm8k.cli import main\ncode = main(['train', '--print-config', '--set', 'steps=7'])\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'numpy', 'orbax', 'grain', 'optax'} & set(sys.modules)\n"
        "sys.stderr.write(','.join(sorted(heavy)))\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == dump(load([], ["steps=7"]))


def test_unknown_key_from_the_shell():
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "train", "--set", "rollout.group_sise=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "'rollout.group_sise'" in done.stderr
    assert "'rollout.group_size'" in done.stderr
    assert "a whole number >= 1" in done.stderr


def test_train_gets_the_config(train):
    calls = train()
    assert cli.main(["train", "--set", "steps=3", "--dry-run", "--set", "compilation_cache="]) == 0
    (config, options), *_ = calls
    assert config == load([], ["steps=3", "compilation_cache="])
    assert options == {"dry_run": True}


def test_exit_code_of_the_run_is_passed_on(train):
    train(lambda config, **options: 75)
    assert cli.main(["train", "--set", "compilation_cache="]) == 75


class Broken(GrpoError, RuntimeError):
    """Something failed on its way."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("say this"), 2),
        (Broken("say this"), 1),
        (ContractError("say this"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_message(train, capsys, error, code):
    train(raising(error))
    assert cli.main(["train", "--set", "compilation_cache="]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "say this" in said or "interrupted" in said


def test_notes_of_an_error_are_said(train, capsys):
    error = Broken("first")
    error.add_note("full traceback: somewhere")
    train(raising(error))
    cli.main(["train", "--set", "compilation_cache="])
    assert "full traceback: somewhere" in capsys.readouterr().err


def test_bugs_keep_their_traceback(train):
    train(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--set", "compilation_cache="])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--nonsense"], ["train", "--conf", "laptop"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_own_commands_get_their_arguments(monkeypatch):
    module = types.ModuleType("grpo_trainer.report.replay")
    seen = []
    module.main = lambda arguments: seen.append(arguments) or 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grpo_trainer.report.replay", module)
    assert cli.main(["replay", "capsule.npz", "--anything"]) == 4
    assert seen == [["capsule.npz", "--anything"]]


def test_slice_option_of_preflight(monkeypatch, quiet_environment):
    module = types.ModuleType("grpo_trainer.assemble.preflight.command")
    seen = []
    module.preflight = lambda config, **options: seen.append((config.slices, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grpo_trainer.assemble.preflight.command", module)
    arguments = [
        "preflight",
        "--config",
        "qwen2.5-7b",
        "--slice",
        "v6e-16",
        "--slice",
        "v4-8",
        "--set",
        "compilation_cache=",
    ]
    assert cli.main(arguments) == 0
    assert seen == [(("v6e-16", "v4-8"), {"search": False})]


def test_cpu_devices_reach_xla(quiet_environment, tmp_path):
    os.environ["XLA_FLAGS"] = "--xla_dump_to=x"
    lines = startup.prepare_process(load([], ["cpu_devices=3", f"compilation_cache={tmp_path / 'cache'}"]))
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert lines[0] == "environment  XLA_FLAGS=--xla_dump_to=x"
    assert [line.split()[0] for line in lines[1:]] == ["devices", "cache"]


def test_contradicting_xla_flags_are_refused(quiet_environment):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    with pytest.raises(ConfigError, match="cpu_devices is 2 but XLA_FLAGS asks for 8"):
        startup.prepare_process(load([], ["cpu_devices=2", "compilation_cache="]))


def test_forcing_devices_too_late_is_refused(quiet_environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    with pytest.raises(ConfigError, match="before jax is imported"):
        startup.prepare_process(load([], ["cpu_devices=2", "compilation_cache="]))


def test_unwritable_cache(quiet_environment, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="compilation_cache"):
        startup.prepare_process(load([], [f"compilation_cache={tmp_path / 'file' / 'cache'}"]))


def test_jax_sees_devices_and_cache(tmp_path):
    script = (
        "from runs import load
from grpo_trainer.settings.layers import \nfrom grpo_trainer.settings.startup import prepare_process\nimport sys\n"
        "prepare_process(load([], ['cpu_devices=3', 'compilation_cache=' + sys.argv[1]]))\n"
        "import jax, json\njax.jit(lambda x: x + 1)(1.0)\nprint(json.dumps([jax.device_count('cpu')]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [3]
    assert any(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_huge_pages_start_again_once(quiet_environment, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: started.append((arguments, environment)))
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.check=1"
    config = load([], ["huge_pages=true", "compilation_cache=", "cpu_devices=0"])
    startup.with_huge_pages(config, ["train", "--set", "huge_pages=true"])
    (arguments, environment), *_ = started
    assert arguments[1:] == ["-m", "grpo_gsm8k.cli", "train", "--set", "huge_pages=true"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    os.environ["GLIBC_TUNABLES"] = environment["GLIBC_TUNABLES"]
    startup.with_huge_pages(config, [])
    startup.with_huge_pages(Settings(huge_pages=False), [])
    assert len(started) == 1
    assert startup.prepare_process(config) == ["huge pages   on (huge_pages)"]
