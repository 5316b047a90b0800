"""`python -m grpo_contracts schema` prints the contract as JSON; `check FILE` says whether a file is valid."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence

from ._errors import ContractError
from ._file import load_batch
from ._schema import schema


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after the program's name; those of the process if None.

    Returns:
        The exit code: 0, or 1 if the file breaks the contract.
    """
    parser = argparse.ArgumentParser(prog="python -m grpo_contracts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("schema", help="print stages, fields, rules and file header as JSON")
    check = commands.add_parser(
        "check", help="print OK, or the first rule that a batch file breaks and exit with code 1"
    )
    check.add_argument("file")
    chosen = parser.parse_args(arguments)
    if chosen.command == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    try:
        batch = load_batch(chosen.file)
    except ContractError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"OK {batch!r}")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `schema | head` ends as `cat | head` does
    sys.exit(main())
