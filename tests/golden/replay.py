"""Compute a library's golden cases and compare with those stored: `python replay.py LIBRARY [--part PART] [--write]`.

Runs with whatever is installed, or on PYTHONPATH; needs numpy and the library alone. Prints a line for each case that
differs and ends with 1, or ends with 0. `--write` stores cases that are new; a stored one is never changed. To change
what a library means, delete the value by hand and bump the version by what that breaks.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MODULES = {
    "grpo-contracts": "cases_contracts",
    "grpo-loss": "cases_loss",
    "grpo-mesh": "cases_mesh",
    "grpo-sampler": "cases_sampler",
}
# float32 sums in another order, by another compiler, stay well within this; a changed formula does not.
_RELATIVE, _ABSOLUTE = 2e-5, 2e-6


def differences(stored: Mapping[str, np.ndarray], computed: Mapping[str, np.ndarray]) -> Iterator[str]:
    """One sentence for each stored case that is not computed any more, or differently."""
    for name, old in stored.items():
        if name not in computed:
            yield f"{name}: is not computed any more"
            continue
        new = computed[name]
        if (old.shape, old.dtype.kind) != (new.shape, new.dtype.kind) or (
            old.dtype.kind == "f" and old.dtype != new.dtype
        ):
            yield f"{name}: was {old.dtype}{list(old.shape)}, is {new.dtype}{list(new.shape)}"
        elif old.dtype.kind == "f":
            apart = ~np.isclose(new, old, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
            if apart.any():
                yield f"{name}: {_first(apart, old, new)}"
        elif (old != new).any():
            yield f"{name}: {_first(old != new, old, new)}"


def _first(apart: np.ndarray, old: np.ndarray, new: np.ndarray) -> str:
    place = tuple(int(i) for i in np.argwhere(apart)[0])
    where = f"at {list(place)} of {list(old.shape)} " if old.ndim else ""
    return f"{where}was {old[place]}, is {new[place]} ({int(apart.sum())} differ)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=MODULES)
    parser.add_argument("--part", help="one of the library's PARTS; default: all")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    path = FOLDER / f"{options.library}.npz"
    stored: dict[str, np.ndarray] = {}
    if path.exists():
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
    parts: dict[str, Callable[[], dict[str, Any]]] = importlib.import_module(MODULES[options.library]).PARTS
    if options.part is not None:
        parts = {options.part: parts[options.part]}
    wanted = {name: value for name, value in stored.items() if name.split("/")[0] in parts or options.part is None}
    computed = {f"{part}/{name}": np.asarray(v) for part, cases in parts.items() for name, v in cases().items()}
    lines = list(differences(wanted, computed))
    print(*lines, sep="\n", end="\n" if lines else "")
    if options.write and (new := {name: value for name, value in computed.items() if name not in stored}):
        np.savez_compressed(path, **stored, **new)  # pyright: ignore[reportArgumentType]
        print(f"stored {len(new)} new cases", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
