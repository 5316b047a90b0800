"""The command line of every app: checked settings first, heavy imports after, and errors as sentences."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from grpo_trainer.report.terminal import OutputError, drop_output, explain_faults, guard_output
from grpo_trainer.settings.layers import dump, load, preset_files
from grpo_trainer.settings.paths import argument_path
from grpo_trainer.settings.startup import prepare_process
from grpo_trainer.task import Task

__all__ = ["Command", "main", "run_app"]

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 75, 130, 141

_MEMBERS = [name for name in vars(Task) if not name.startswith("_")]

# (module:function taking a task and the arguments after the command's name, one line of help)
Command = tuple[str, str]

# Commands that read a run's settings: name -> (module:function taking settings and task, one line of help).
_CONFIGURED = {
    "train": ("grpo_trainer.train:train", "train a policy with GRPO and show what it learned"),
    "eval": (
        "grpo_trainer.evaluate.command:evaluate_command",
        "measure policies on held-out problems, and compare them",
    ),
    "preflight": (
        "grpo_trainer.assemble.preflight.command:preflight",
        "prove on this machine that a run fits its TPU slice",
    ),
}
_OWN: dict[str, Command] = {
    "export": ("grpo_trainer.report.export:main", "write a run's policy as a Hugging Face folder"),
    "report": ("grpo_trainer.report.runs:main", "write the page of a run, or one page that compares several runs"),
    "replay": ("grpo_trainer.report.replay:main", "run a failed step again and say what was not finite"),
}


def run_app(task: Task, commands: Mapping[str, Command] | None = None) -> NoReturn:
    """Run the command that this process was started with, and end the process with its exit code.

    Args:
        task: of the app.
        commands: the app's own commands, by name.
    """
    guard_output()
    explain_faults(f"grpo-{task.name}")
    code = main(task, commands=commands)
    if code and "grpo_mesh" in sys.modules:
        import jax

        from grpo_mesh import abort

        if jax.distributed.is_initialized() and jax.process_count() > 1 and code != EXIT_PREEMPTED:
            abort(code, "see the message above")  # a plain exit would wait for processes that wait for this one
    sys.exit(code)


def main(task: Task, arguments: Sequence[str] | None = None, *, commands: Mapping[str, Command] | None = None) -> int:
    """Run one command.

    Args:
        task: of the app.
        arguments: of the command line; None: this process's.
        commands: the app's own commands, by name.

    Returns:
        Exit code: 0 done, 1 failed, 2 a setting or input must be changed, 75 stopped on request and resumable,
        130 interrupted, 141 the reader of standard output went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if missing := [name for name in _MEMBERS if not hasattr(task, name)]:
        raise TypeError(f"the task {type(task).__name__} lacks {', '.join(missing)}: see grpo_trainer.task.Task")
    own = _OWN | dict(commands or {})
    try:
        os.getcwd()
    except OSError as error:
        reason = f"error: the working directory cannot be used: {error.strerror}. Change to one that exists"
        return _fail(task, reason, EXIT_USAGE)
    try:
        with _end_on_sigterm(task, resumes=given[:1] == ["train"]):
            code = _dispatch(task, given, own)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _fail(task, "interrupted", EXIT_INTERRUPTED)
    except OutputError as error:
        drop_output()
        if isinstance(error.__cause__, BrokenPipeError):
            return EXIT_CLOSED_PIPE  # whoever reads has seen enough: nothing to say
        return _fail(task, f"error: standard output cannot be written: {error}", EXIT_FAILED)
    except _grpo_error() as error:
        notes = [str(note) for note in getattr(error, "__notes__", ())]
        return _fail(task, "\n".join([f"error: {error}", *notes]), _exit_code(error))


def _dispatch(task: Task, given: Sequence[str], own: Mapping[str, Command]) -> int:
    if given and given[0] in own:
        return int(_function(own[given[0]][0])(task, given[1:]) or 0)
    try:
        options = _parser(task, own).parse_args(given)
    except SystemExit:
        sys.stdout.flush()  # what --help printed
        raise
    return _run(task, options)


@contextlib.contextmanager
def _end_on_sigterm(task: Task, *, resumes: bool) -> Iterator[None]:
    """Until the loop listens for itself, SIGTERM ends the process at once; the same command does again what is lost."""
    then = "the same command resumes the run" if resumes else "run the command again"
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    # A thread waits for the signal, because the main thread may wait in C: for a compiler, or for peers of its job.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def listen() -> None:
        while byte := os.read(read_end, 1):
            if byte[0] == signal.SIGTERM:
                with contextlib.suppress(OSError):
                    os.write(2, f"grpo-{task.name}: stopped by SIGTERM; {then}\n".encode())
                os._exit(EXIT_PREEMPTED)

    listener = threading.Thread(target=listen, name="sigterm", daemon=True)
    listener.start()
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, handler)
        os.close(write_end)
        listener.join()
        os.close(read_end)


def _run(task: Task, options: argparse.Namespace) -> int:
    sets = list(options.sets)
    if getattr(options, "slice", None):
        sets.append(f"slices=[{', '.join(options.slice)}]")
    configs = list(options.config)
    if options.command == "eval":
        configs, sets = _evaluated(options, configs, sets)
    settings = load(task, configs, sets)
    if options.print_config:
        sys.stdout.write(dump(settings))
        return 0
    for line in prepare_process(settings):
        print(line, flush=True)
    if options.command != "preflight":
        _join_the_job()
        _start_devices()
    run = _function(_CONFIGURED[options.command][0])
    return int(run(settings, task, **_extra(options)) or 0)


def _evaluated(options: argparse.Namespace, configs: list[str], sets: list[str]) -> tuple[list[str], list[str]]:
    """What a run was asked with, all policies are measured with: the first run's settings lie under files and sets."""
    from grpo_trainer.run.files import locate_run

    if options.checkpoint is not None and locate_run(options.checkpoint.expanduser()) is None:
        raise _config_error(f"--checkpoint must be the folder of a run, with its config.yaml: got {options.checkpoint}")
    paths = [Path(path).expanduser() for path in (options.checkpoint, *options.policies) if path is not None]
    if runs := [found[0] for path in paths if (found := locate_run(path))]:
        return [str(runs[0] / "config.yaml"), *configs], sets
    # What the task asks for depends on the policy: all are asked as the first one is.
    return configs, [*(f"model.path={name}" for name in options.policies[:1]), *sets]


def _join_the_job() -> None:
    from grpo_mesh import initialize

    job = initialize()
    if job.processes > 1:
        print(f"job          {job}", flush=True)


def _start_devices() -> None:
    import jax

    from grpo_trainer.settings.errors import ConfigError

    try:
        jax.devices()
    except RuntimeError as error:  # jax's own word for a platform that is not there
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f". JAX_PLATFORMS={asked} asks for it: unset it, or install jax for this machine" if asked else ""
        raise ConfigError(f"jax cannot start its devices: {error}{hint}") from error


def _extra(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a configured command takes besides its settings."""
    names = {"train": ("dry_run",), "eval": ("checkpoint", "policies", "split"), "preflight": ("search", "quick")}[
        options.command
    ]
    return {name: getattr(options, name) for name in names}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        setting = re.match(r"unrecognized arguments: ([a-z_.]+=\S*)", message)
        super().error(f"{message}. Settings follow --set: --set {setting[1]}" if setting else message)


def _parser(task: Task, own: Mapping[str, Command]) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"grpo-{task.name}", description=task.title, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in _CONFIGURED.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        command.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="NAME|PATH",
            help=f"a preset ({', '.join(preset_files(task))}) or a YAML file; repeatable, later ones win",
        )
        command.add_argument(
            "--set",
            dest="sets",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="one or several settings, such as rollout.group_size=16; repeatable",
        )
        command.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
        if name == "train":
            command.add_argument("--dry-run", action="store_true", help="validate and build everything, then stop")
        if name == "eval":
            command.add_argument(
                "--checkpoint",
                type=argument_path,
                metavar="RUN",
                help="a run's folder, whose newest checkpoint is measured, with the run's settings",
            )
            command.add_argument(
                "--split",
                choices=("test", "train"),
                default="test",
                help="the problems: held-out ones (the default), or those to train on, for data.filter.pass_rate",
            )
            command.add_argument(
                "policies",
                nargs="*",
                metavar="POLICY",
                help="a run's folder, RUN/checkpoints/step_N, a folder in Hugging Face layout or a Hub id; all are "
                "measured with the settings of the first run among them, and compared",
            )
        if name == "preflight":
            command.add_argument(
                "--slice",
                action="append",
                metavar="NAME",
                help="TPU slice such as v5e-16, instead of the settings' own; repeatable",
            )
            command.add_argument(
                "--search",
                action="store_true",
                help="find the fastest layout: meshes, micro-batches, remat and slots",
            )
            command.add_argument(
                "--quick",
                action="store_true",
                help="do not generate code: the same figures but for the code's size and a MiB, in a tenth of the time",
            )
    for name, (_, text) in own.items():
        commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    return parser


def _function(address: str) -> Callable[..., Any]:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def _grpo_error() -> type[Exception]:
    # Evaluated only once something was raised: --print-config stays free of numpy, which grpo_contracts imports.
    from grpo_contracts import GrpoError

    return GrpoError


def _config_error(message: str) -> Exception:
    from grpo_trainer.settings.errors import ConfigError

    return ConfigError(message)


def _exit_code(error: Exception) -> int:
    from grpo_contracts import ContractError

    # Settings and inputs are refused as ValueErrors. A broken contract is one too, but ours to mend, not the user's.
    return EXIT_USAGE if isinstance(error, ValueError) and not isinstance(error, ContractError) else EXIT_FAILED


def _fail(task: Task, message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"grpo-{task.name}: {message}", file=sys.stderr, flush=True)
    return code
