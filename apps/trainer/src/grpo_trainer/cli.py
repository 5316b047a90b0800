"""The command line: a checked config first, heavy imports after, and errors as sentences."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from grpo_trainer.settings.layers import dump, load, preset_names
from grpo_trainer.run.startup import before_jax, with_huge_pages

__all__ = ["main"]

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130

# Commands that read a run's settings: name -> (module:function taking the config, one line of help).
_CONFIGURED = {
    "train": ("grpo_trainer.train:train", "train a policy with GRPO and show what it learned"),
    "eval": ("grpo_trainer.evaluate:evaluate_command", "measure a policy on held-out problems"),
    "preflight": ("grpo_trainer.assemble.preflight.command:preflight", "prove on this machine that a run fits its TPU slice"),
}
# Commands with options of their own: name -> (module:function taking the arguments, one line of help).
_OWN = {
    "warmstart": ("grpo_gsm8k.embedded.warmstart:main", "make the embedded policy from scratch by supervised training"),
    "make-data": ("grpo_gsm8k.embedded.problems:main", "write the embedded problems as JSONL in GSM8K's format"),
    "make-tokenizer": ("grpo_gsm8k.embedded.tokenizer:main", "make the embedded tokenizer from the problems"),
    "replay": ("grpo_trainer.run.replay:main", "run a failed step again from its capsule and say what was not finite, where"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        Exit code: 0 done, 1 failed, 2 a setting or input must be changed, 75 stopped on request and resumable,
        130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except _grpo_error() as error:
        notes = [str(note) for note in getattr(error, "__notes__", ())]
        return _fail("\n".join([f"error: {error}", *notes]), _exit_code(error))


def _run(given: list[str]) -> int:
    if given and given[0] in _OWN:
        return int(_function(_OWN[given[0]][0])(given[1:]) or 0)
    options = _parser().parse_args(given)
    sets = list(options.sets)
    if getattr(options, "slice", None):
        sets.append(f"slices=[{', '.join(options.slice)}]")
    config = load(options.config, sets)
    if options.print_config:
        sys.stdout.write(dump(config))
        return 0
    if options.command == "train":
        with_huge_pages(config, given)
    for line in before_jax(config):
        print(line, flush=True)
    if options.command != "preflight":
        _join_the_job()
    run = _function(_CONFIGURED[options.command][0])
    return int(run(config, **_extra(options)) or 0)


def _join_the_job() -> None:
    from grpo_mesh import initialize

    job = initialize()
    if job.processes > 1:
        print(f"job          {job}", flush=True)


def _extra(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a configured command takes besides its config."""
    names = {"train": ("dry_run",), "eval": ("checkpoint",), "preflight": ("search",)}[options.command]
    return {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grpo-gsm8k", description="GRPO on grade-school mathematics.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in _CONFIGURED.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        command.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="NAME|PATH",
            help=f"a preset ({', '.join(preset_names())}) or a YAML file; repeatable, later ones win",
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
            command.add_argument("--checkpoint", metavar="RUN", help="run folder whose newest checkpoint is measured")
        if name == "preflight":
            command.add_argument(
                "--slice",
                action="append",
                metavar="NAME",
                help="TPU slice such as v5e-16, in place of the config's; repeatable",
            )
            command.add_argument(
                "--search", action="store_true", help="try meshes and micro-batches, rank those that fit"
            )
    for name, (_, text) in _OWN.items():
        commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    return parser


def _function(address: str) -> Callable[..., Any]:
    module, _, name = address.partition(":")
    return getattr(import_module(module), name)


def _grpo_error() -> type[Exception]:
    # Evaluated only once something was raised: --print-config stays free of numpy, which grpo_contracts imports.
    from grpo_contracts import GrpoError

    return GrpoError


def _exit_code(error: Exception) -> int:
    from grpo_contracts import ContractError

    # Settings and inputs are refused as ValueErrors. A broken contract is one too, but ours to mend, not the user's.
    return EXIT_USAGE if isinstance(error, ValueError) and not isinstance(error, ContractError) else EXIT_FAILED


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"grpo-gsm8k: {message}", file=sys.stderr, flush=True)
    return code


def _exit() -> NoReturn:
    code = main()
    if code and "grpo_mesh" in sys.modules:
        import jax

        from grpo_mesh import leave

        if jax.process_count() > 1 and code != EXIT_PREEMPTED:
            leave(code, "see the message above")  # a plain exit would wait for processes that wait for this one
    sys.exit(code)


if __name__ == "__main__":
    _exit()
