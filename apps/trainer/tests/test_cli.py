"""The command line: nothing heavy before a config is valid, and errors as sentences with exit codes."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from toy import TASK, load

from grpo_contracts import ContractError, GrpoError
from grpo_mesh import HostsError
from grpo_trainer import cli
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.layers import dump
from grpo_trainer.settings.startup import prepare_process

HERE = Path(__file__).parent


@pytest.fixture
def train(monkeypatch):
    """A stand-in for the training loop that does as it is told."""
    calls = []

    def install(action=lambda settings, task, **options: 0):
        def run(settings, task, **options):
            calls.append((settings, task, options))
            return action(settings, task, **options)

        module = types.ModuleType("grpo_trainer.train")
        module.train = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "grpo_trainer.train", module)
        return calls

    return install


def main(*arguments: str, **options) -> int:
    return cli.main(TASK, [*arguments], **options)


def raising(error):
    def action(settings, task, **options):
        raise error

    return action


def test_a_setting_without_set_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("train", "steps=3")
    assert "unrecognized arguments: steps=3. Settings follow --set: --set steps=3" in capsys.readouterr().err


def test_print_config_is_light():
    """It imports nothing that takes a second to load: so it answers at once, also on a busy machine."""
    script = (
        "import sys\nfrom toy import TASK\nfrom grpo_trainer.cli import main\n"
        "code = main(TASK, ['train', '--print-config', '--set', 'steps=7'])\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'numpy', 'orbax', 'grain', 'optax'} & set(sys.modules)\n"
        "sys.stderr.write(','.join(sorted(heavy)))\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=HERE)
    assert done.stderr == ""
    assert done.stdout == dump(load([], ["steps=7"]))


def test_unknown_key_from_the_shell():
    command = [sys.executable, str(HERE / "toy.py"), "train", "--set", "rollout.group_sise=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "'rollout.group_sise'" in done.stderr
    assert "'rollout.group_size'" in done.stderr
    assert "a whole number >= 1" in done.stderr


def test_train_gets_the_settings_and_the_task(train):
    calls = train()
    assert main("train", "--set", "steps=3", "--dry-run", "--set", "compilation_cache=") == 0
    assert calls == [(load([], ["steps=3", "compilation_cache="]), TASK, {"dry_run": True})]


def test_exit_code_of_the_run_is_passed_on(train):
    train(lambda settings, task, **options: 75)
    assert main("train", "--set", "compilation_cache=") == 75


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
    assert main("train", "--set", "compilation_cache=") == code
    message = capsys.readouterr().err
    assert message.startswith("grpo-toy: ")
    assert "Traceback" not in message
    assert "say this" in message or "interrupted" in message


def run_toy(*arguments: str, **options):
    command = [sys.executable, str(HERE / "toy.py"), *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=120, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_on_a_full_disk():
    with open("/dev/full", "wb") as full:
        done = run_toy("train", "--print-config", stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("grpo-toy: error: standard output cannot be written")
    assert done.stderr.count(b"\n") == 1


def test_output_whose_reader_went_away():
    reader, writer = os.pipe()
    os.close(reader)
    done = run_toy("train", "--print-config", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_in_ascii(tmp_path):
    done = run_toy(
        "train", "--print-config", "--set", "run.dir=données", stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert b"donn\\xe9es" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_a_working_directory_that_was_deleted(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} {HERE / 'toy.py'} train --print-config"
    done = subprocess.run(["sh", "-c", command], cwd=gone, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("grpo-toy: error: the working directory cannot be used")


def test_a_platform_that_is_not_there():
    done = run_toy("train", "--dry-run", stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "no-such"})
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"JAX_PLATFORMS=no-such asks for it" in done.stderr


def test_a_fault_of_the_program_says_so_and_where_it_was_written(tmp_path):
    script = (
        "import types, sys\nfrom toy import TASK\nfrom grpo_trainer import cli\n"
        "sys.modules['broken'] = types.SimpleNamespace(main=lambda task, arguments: 1 / 0)\n"
        "cli.run_app(TASK, {'break': ('broken:main', 'break')})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "break"], capture_output=True, text=True, check=False, cwd=HERE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    (file,) = tmp_path.iterdir()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("grpo-toy: this is a fault of the program")
    assert last.endswith(f"{file}, too")
    assert "ZeroDivisionError" in file.read_text()
    assert "ZeroDivisionError" in done.stderr


def test_notes_of_an_error_are_printed(train, capsys):
    error = Broken("first")
    error.add_note("full traceback: somewhere")
    train(raising(error))
    main("train", "--set", "compilation_cache=")
    assert "full traceback: somewhere" in capsys.readouterr().err


def test_bugs_keep_their_traceback(train):
    train(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main("train", "--set", "compilation_cache=")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--nonsense"], ["train", "--conf", "laptop"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2


def test_own_commands_get_the_task_and_their_arguments(monkeypatch):
    module = types.ModuleType("own_commands")
    seen = []
    module.bake = lambda task, arguments: seen.append((task, arguments)) or 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_commands", module)
    commands = {"bake": ("own_commands:bake", "bake a policy")}
    assert main("bake", "at=200", "--anything", commands=commands) == 4
    assert seen == [(TASK, ["at=200", "--anything"])]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(TASK, ["--help"], commands={"bake": ("own_commands:bake", "bake a policy")})
    shown = capsys.readouterr().out
    assert TASK.title in shown
    assert all(name in shown for name in ("train", "eval", "preflight", "replay", "bake a policy"))


def test_help_names_the_tasks_presets(capsys):
    with pytest.raises(SystemExit):
        main("train", "--help")
    assert "laptop, large" in " ".join(capsys.readouterr().out.split())


def test_slice_option_of_preflight(monkeypatch):
    module = types.ModuleType("grpo_trainer.assemble.preflight.command")
    seen = []
    module.preflight = lambda settings, task, **options: seen.append((settings.slices, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grpo_trainer.assemble.preflight.command", module)
    slices = ("--slice", "v6e-16", "--slice", "v4-8")
    assert main("preflight", "--config", "large", *slices, "--set", "compilation_cache=") == 0
    assert seen == [(("v6e-16", "v4-8"), {"search": False, "quick": False})]


def test_a_process_is_prepared_as_the_settings_say(tmp_path):
    """In a process of its own: devices, cache and pages are set once, before jax starts."""
    script = (
        "from toy import load\nfrom grpo_trainer.settings.startup import prepare_process\nimport sys, json\n"
        "lines = prepare_process(load([], ['cpu_devices=3', 'compilation_cache=' + sys.argv[1]]))\n"
        "import jax\njax.jit(lambda x: x + 1)(1.0)\nprint(json.dumps([jax.device_count('cpu'), lines]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=HERE)
    devices, lines = json.loads(done.stdout)
    assert devices == 3
    assert any((tmp_path / "cache").iterdir())
    assert lines == [
        "environment  JAX_PLATFORMS=cpu",
        "environment  XLA_FLAGS=--xla_cpu_enable_fast_math=false",
        "devices      3 forced out of the CPU (cpu_devices)",
        f"cache        {tmp_path / 'cache'} (compilation_cache)",
    ]


@pytest.mark.parametrize(
    ("setting", "function"),
    [("cpu_devices=2", "force_cpu_devices"), ("compilation_cache=somewhere", "use_compilation_cache")],
)
def test_what_cannot_be_prepared_is_a_wrong_setting(monkeypatch, setting, function):
    def refuse(_, *, setting):
        raise HostsError(f"{setting} is not possible here")

    monkeypatch.setattr(f"grpo_mesh.{function}", refuse)
    with pytest.raises(ConfigError, match=f"^{setting.partition('=')[0]} is not possible here"):
        prepare_process(load([], ["compilation_cache=", setting]))


def test_huge_pages_come_first(monkeypatch):
    """The process is replaced, so whatever was set before would be lost."""

    class Replaced(BaseException):
        pass

    def replace_process():
        raise Replaced

    monkeypatch.setattr("grpo_mesh.restart_with_huge_pages", replace_process)
    monkeypatch.setattr("grpo_mesh.use_compilation_cache", lambda *_, **__: pytest.fail("set before the restart"))
    with pytest.raises(Replaced):
        prepare_process(load([], ["huge_pages=true"]))


@pytest.mark.parametrize(("has", "text"), [(True, "on"), (False, f"not available on {sys.platform}")])
def test_huge_pages_are_reported(monkeypatch, has, text):
    monkeypatch.setattr("grpo_mesh.restart_with_huge_pages", lambda: None)
    monkeypatch.setattr("grpo_mesh.has_huge_pages", lambda: has)
    lines = prepare_process(load([], ["huge_pages=true", "compilation_cache="]))
    assert lines[-1] == f"huge pages   {text} (huge_pages)"


# Commands whose stand-in for the training loop waits in C, as for a lost peer, or prints for ever.
STUCK = """
import ctypes
print("building", flush=True)
lock = ctypes.create_string_buffer(256)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""
TALKS = "while True: print('step')"


def start(body, *arguments) -> Any:
    script = (
        "import os, sys, types\nfrom grpo_trainer import cli\nfrom toy import TASK\n"
        "module = types.ModuleType('standin')\n"
        "module.train = lambda settings, task, **options: exec(os.environ['BODY'], {})\n"
        "sys.modules['grpo_trainer.train'] = module\ncli.run_app(TASK)\n"
    )
    command = [sys.executable, "-c", script, "train", "--set", "compilation_cache=", *arguments]
    quiet = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }  # else announced
    environment = {**quiet, "BODY": body, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE, env=environment
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux is a lock of zeros valid")
def test_a_signal_while_a_run_is_built_ends_it_as_one_that_can_go_on():
    process = start(STUCK)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == cli.EXIT_PREEMPTED
    assert process.stderr.read() == "grpo-toy: stopped by SIGTERM; the same command resumes the run\n"


@pytest.mark.parametrize("arguments", [["--print-config"], ["--help"], []])
@pytest.mark.parametrize("both", [False, True])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments, both):
    process = start(TALKS, *arguments)
    process.stdout.close()
    if both:
        process.stderr.close()
    assert process.wait(60) == cli.EXIT_CLOSED_PIPE
    assert both or process.stderr.read() == ""


def test_another_broken_pipe_is_an_error(train):
    train(raising(BrokenPipeError("of a worker")))
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main("train", "--set", "compilation_cache=")
