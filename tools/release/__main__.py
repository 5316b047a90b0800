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
    return _report(problems, "every file contains what it should and nothing else")


def _check(workspace: Workspace, options: argparse.Namespace) -> int:
    return _report(disagreements(workspace), "pins, ranges, changelogs, versions and tags agree")


def _bump(workspace: Workspace, options: argparse.Namespace) -> int:
    done = bump(
        workspace, options.package, Level[options.level.upper()], since=options.since, day=datetime.date.today()
    )
    version = workspace[options.package].version
    if done.verdict is None:
        print("compared with nothing: a first release, the trainer and the apps may take any level")
    else:
        print(f"compared with {done.since}", *done.verdict.lines(), sep="\n")
        print(f"the change requires {done.verdict.demands(version).name.lower()}")
    print(f"{options.package} {version} -> {done.version}")
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
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(
            compat.compatibility(
                candidate,
                Path(scratch),
                repository=workspace.root,
                baseline=baseline,
                reverse=options.reverse,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        )
    print(f"released: the trainer and apps of {baseline}", compat.table(rows), sep="\n")
    problems = [
        f"{row.swapped} {row.candidate}: needs a {row.honest.name.lower()} bump from {row.pinned}"
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


def _report(problems: list[str], success: str) -> int:
    for text in problems:
        print(text)
    print(f"{len(problems)} to fix" if problems else success)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="release", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to work on; default: this repository")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Workspace, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    build = command("build", _build, "build and inspect every wheel and source distribution")
    build.add_argument("--out", type=Path, default=Path("dist"))
    command("check", _check, "find where pins, ranges, changelogs, versions and tags disagree")
    bumped = command("bump", _bump, "raise a version, unless the change requires a larger step")
    bumped.add_argument("package")
    bumped.add_argument("level", choices=[level.name.lower() for level in reversed(Level)])
    bumped.add_argument("--since", metavar="REF", help="commit to compare with; default: the last release")
    command("graph", _graph, "print the dependency graph")
    matrix = command("compat", _compat, "run the released trainer and apps with each changed package of the tree")
    matrix.add_argument("--baseline", metavar="REF", help="commit of the release; default: the last one")
    matrix.add_argument("--candidate", type=Path, metavar="TREE", help="tree of the candidates; default: this one")
    matrix.add_argument(
        "--reverse", action="store_true", help="also run the tree's trainer and apps with each released package"
    )
    names = command("names", _names, "print the public names of every library")
    names.add_argument("--write", action="store_true", help=f"freeze them in {NAMES}/")
    command("weigh", _weigh, "measure each library installed alone: size, dependencies, import time")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0, or 1 if there is something to fix."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(read_workspace(options.root), options)
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
