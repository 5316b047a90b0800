"""Downloads from the Hugging Face Hub: the only place that reaches the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from grpo_contracts import GrpoError

__all__ = ["HubError", "download", "is_hub_id"]


class HubError(GrpoError, ValueError):
    """The Hub does not give out a repository, and its cache does not hold it."""


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a Hub repository, and not only a path that is misspelt.

    Args:
        name: such as ``Qwen/Qwen2.5-0.5B``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, slash, rest = name.partition("/")
    if not slash or not rest or "/" in rest or Path(owner).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def download(name: str, kind: Literal["model", "dataset"], files: Sequence[str]) -> Path:
    """Fetch files of a repository, or find them in the Hub's cache.

    Args:
        name: OWNER/NAME.
        kind: of repository.
        files: patterns of the files that are wanted.

    Returns:
        The folder of the snapshot.

    Raises:
        HubError: there is no such repository, or no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # also its HTTP errors, and what is not in the cache while it is offline
        reason = " ".join(str(error).split()).rstrip(".")
        raise HubError(
            f"the Hub download of {kind} {name} failed: {type(error).__name__}: {reason[:500]}. Without a network, "
            "download it elsewhere and name the folder"
        ) from error
