"""A check at the start that all processes of a job mean the same job."""

from __future__ import annotations

import collections
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mesh import _runtime
from grpo_mesh._deadline import arrive
from grpo_mesh._errors import HostsError

PACKAGES = (
    "jax", "jaxlib", "libtpu", "numpy", "flax", "optax",
    "grpo-contracts", "grpo-mesh", "grpo-sampler", "grpo-loss",
)  # fmt: skip
_round = itertools.count()


def check_agreement(facts: Mapping[str, Any], *, packages: Sequence[str] = PACKAGES, timeout: float = 60) -> None:
    """Compares facts among all processes; each must pass the same.

    Args:
        facts: what must be equal everywhere, nested mappings of plain values: the resolved configuration, shapes of
            the programs to be compiled, the digest of the data.
        packages: distributions whose versions must be equal as well (absent everywhere is equal, too).
        timeout: seconds to wait for all processes.

    Raises:
        HostsError: they differ; every process gets the same message with the odd ranks and what differs.
        DeadlineError: not all processes came in time; names those missing.
    """
    mine = _flatten("", facts) | {f"version.{name}": json.dumps(version(name)) for name in packages}
    mine["version.python"] = json.dumps(platform.python_version())
    if not _runtime.started():
        return
    folder = f"grpo_mesh/agreement/{next(_round)}"
    _runtime.put(f"{folder}/{_runtime.rank()}", json.dumps(mine))
    arrive("the check of agreement", timeout)
    told = {int(rank): json.loads(text) for rank, text in _runtime.entries(folder).items()}
    if message := disagreement(told):
        arrive("the report of a disagreement", timeout)  # who leaves first must not take the facts from the others
        raise HostsError(message)


def disagreement(told: Mapping[int, Mapping[str, str]]) -> str | None:
    """Words what differs among ranks.

    Args:
        told: rank to its facts.

    Returns:
        None if all are equal, else a message that names the odd ranks: those that differ from most, or from rank 0.
    """
    lines, odd = [], set()
    for key in sorted(set().union(*told.values())):
        ranks_by_value = collections.defaultdict(list)
        for rank in sorted(told):
            ranks_by_value[told[rank].get(key, "absent")].append(rank)
        if len(ranks_by_value) > 1:
            usual = max(ranks_by_value.values(), key=lambda ranks: (len(ranks), 0 in ranks))
            strays = sorted(set(told) - set(usual))
            odd.update(strays)
            parts = [f"{_ranks(ranks)}: {_short(value)}" for value, ranks in ranks_by_value.items()]
            lines.append(f"  {key}: " + "; ".join(parts))
    if not lines:
        return None
    names = ", ".join(map(str, sorted(odd)))
    head = f"all {len(told)} processes must run the same job; odd: rank {names}. They differ in:"
    return "\n".join([head, *lines, "Start every process with the same configuration, code and data."])


def version(name: str) -> str | None:
    """Returns the version of an installed distribution, None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flatten(prefix: str, facts: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(f"{name}.", value)
        else:
            try:
                flat[name] = json.dumps(value, sort_keys=True)
            except TypeError as error:
                raise HostsError(f"fact {name!r} must be a plain value: {error}. Pass its text or digest.") from error
    return flat


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}"


def _short(value: str) -> str:
    return value if len(value) <= 120 else value[:117] + "..."
