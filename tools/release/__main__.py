"""`python -m tools.release COMMAND`, run from the repository's root."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import artifacts, compat, weigh
from .agreement import disagreements
from .bump import bump
from .graph import graph
from .surface import public_names
from .verdict import Level
from .workspace import ROOT, ReleaseError, Workspace, read_workspace

NAMES = Path("tests/public_names")


def _build(workspace: Workspace, options: argparse.Namespace) -> int:
    packages = list(workspace.packages.values())
    files = artifacts.build(packages, options.out)
    problems = [text for package in packages for text in artifacts.inspect(workspace, package, options.out)]
    problems += artifacts.twine_check(files)
    for path in files:
        print(f"{path.stat().st_size / 1e3:9.1f} kB  {path}")
    return _report(problems, "every file holds what it should and nothing else")


def _check(workspace: Workspace, options: argparse.Namespace) -> int:
    return _report(disagreements(workspace), "pins, ranges, changelogs, versions and tags agree")


def _bump(workspace: Workspace, options: argparse.Namespace) -> int:
    done = bump(
        workspace, options.library, Level[options.level.upper()], since=options.since, day=datetime.date.today()
    )
    if done.verdict is None:
        print("nothing to compare with: any level is honest")
    else:
        print(f"compared with {done.since}")
        needed = done.verdict.demands(workspace[options.library].version)
        print(*done.verdict.lines(), f"the change demands {needed.name.lower()}", sep="\n")
    print(f"{options.library} {workspace[options.library].version} -> {done.version}")
    for text in done.left:
        print(f"left to do: {text}")
    print(f"after merging: git tag {done.tag}")
    return 0


def _graph(workspace: Workspace, options: argparse.Namespace) -> int:
    print(graph(workspace))
    return 0


def _compat(workspace: Workspace, options: argparse.Namespace) -> int:
    candidate = workspace if options.candidate is None else read_workspace(options.candidate)
    baseline = options.baseline or compat.last_release(workspace.root, candidate)
    print(f"released: the app of {baseline}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(
            compat.compatibility(
                candidate,
                Path(scratch),
                repository=workspace.root,
                baseline=baseline,
                say=lambda text: print(text, file=sys.stderr),
            )
        )
    print(compat.table(rows))
    problems = [
        f"{row.library} {row.candidate}: needs a {row.honest.name.lower()} bump from {row.pinned}"
        for row in rows
        if not row.holds and row.honest is not None
    ]
    return _report(problems, "every candidate is compatible, or its version says that it is not")


def _names(workspace: Workspace, options: argparse.Namespace) -> int:
    for package in workspace.libraries:
        text = "\n".join(public_names(package.sources, package.module)) + "\n"
        if options.write:
            (workspace.root / NAMES / f"{package.module}.txt").write_text(text)
        else:
            print(f"# {package.module}\n{text}")
    return 0


def _weigh(workspace: Workspace, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        artifacts.build(workspace.libraries, scratch / "wheels", wheels_only=True)
        for line in weigh.table(weigh.weigh(workspace, scratch / "wheels", scratch / "environments")):
            print(line, flush=True)
    return 0


def _report(problems: list[str], fine: str) -> int:
    for text in problems:
        print(text)
    print(f"{len(problems)} to put right" if problems else fine)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="release", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to work on; default: this repository")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Workspace, argparse.Namespace], int], told: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=told)
        added.set_defaults(run=run)
        return added

    made = command("build", _build, "build every wheel and source distribution and look into them")
    made.add_argument("--out", type=Path, default=Path("dist"))
    command("check", _check, "say where pins, ranges, changelogs, versions and tags disagree")
    made = command("bump", _bump, "raise a version, unless the change demands more")
    made.add_argument("library")
    made.add_argument("level", choices=[level.name.lower() for level in reversed(Level)])
    made.add_argument("--since", metavar="REF", help="commit to compare with; default: the last release")
    command("graph", _graph, "print the dependency graph")
    made = command("compat", _compat, "run the released app with each changed library of the working tree")
    made.add_argument("--baseline", metavar="REF", help="commit of the released app; default: the last release")
    made.add_argument("--candidate", type=Path, metavar="TREE", help="tree of the candidates; default: this one")
    made = command("names", _names, "print the public names of every library")
    made.add_argument("--write", action="store_true", help=f"freeze them in {NAMES}/")
    command("weigh", _weigh, "measure each library installed alone: size, dependencies, time to import")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 when something is to be put right."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(read_workspace(options.root), options)
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
