"""A check at the start that all processes of a job run the same job."""

from __future__ import annotations

import collections
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mesh import _runtime
from grpo_mesh._deadline import barrier
from grpo_mesh._errors import HostsError

# What decides which program is compiled, whichever trainer runs.
_PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")
_checks = itertools.count()


def check_agreement(facts: Mapping[str, Any], *, packages: Sequence[str] = (), timeout: float = 60) -> None:
    """Compares facts among all processes; each must pass the same. All processes must call it.

    Args:
        facts: what must be equal everywhere, nested mappings of plain values: the resolved configuration, the shapes of
            the programs, the digest of the data.
        packages: distributions whose versions must be equal as well. Versions of Python, jax, jaxlib, libtpu and numpy
            are always compared; a distribution may be absent if it is absent everywhere.
        timeout: seconds to wait for all processes.

    Raises:
        HostsError: they differ; every process gets the same message with the odd ranks and what differs.
        DeadlineError: not all processes came in time; names those missing.
    """
    names = dict.fromkeys((*_PACKAGES, *packages))
    own = _flatten("", facts) | {f"version.{name}": json.dumps(_version(name)) for name in names}
    own["version.python"] = json.dumps(platform.python_version())
    if not _runtime.started():
        return
    folder = f"grpo_mesh/agreement/{next(_checks)}"
    _runtime.put(f"{folder}/{_runtime.rank()}", json.dumps(own))
    barrier("the check of agreement", timeout)
    facts_by_rank = {int(rank): json.loads(text) for rank, text in _runtime.entries(folder).items()}
    if message := disagreement(facts_by_rank):
        # The first to end would take the facts from those that still read them.
        barrier("the report of a disagreement", timeout)
        raise HostsError(message)


def disagreement(facts_by_rank: Mapping[int, Mapping[str, str]]) -> str | None:
    """Describes what differs among ranks.

    Args:
        facts_by_rank: rank to its facts.

    Returns:
        None if all are equal, else a message that names the odd ranks: those that differ from most, or from rank 0.
    """
    lines, odd = [], set()
    for key in sorted(set().union(*facts_by_rank.values())):
        ranks_by_value = collections.defaultdict(list)
        for rank in sorted(facts_by_rank):
            ranks_by_value[facts_by_rank[rank].get(key, "absent")].append(rank)
        if len(ranks_by_value) > 1:
            usual = max(ranks_by_value.values(), key=lambda ranks: (len(ranks), 0 in ranks))
            odd.update(set(facts_by_rank) - set(usual))
            parts = [f"{_ranks(ranks)}: {_short(value)}" for value, ranks in ranks_by_value.items()]
            lines.append(f"  {key}: " + "; ".join(parts))
    if not lines:
        return None
    names = ", ".join(map(str, sorted(odd)))
    head = f"all {len(facts_by_rank)} processes must run the same job; odd: rank {names}. They differ in:"
    return "\n".join([head, *lines, "Start every process with the same configuration, code and data."])


def _version(name: str) -> str | None:
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
