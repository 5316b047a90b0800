"""The policy's tokenizer, loaded and checked for what training needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_contracts import GrpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizerError", "end_ids", "load_tokenizer", "padding_id"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class TokenizerError(GrpoError, ValueError):
    """A tokenizer cannot be made, or lacks something that training needs."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load any Hugging Face tokenizer.

    Args:
        path: a folder or a hub id.

    Returns:
        The tokenizer, with an end token.

    Raises:
        TokenizerError: if it cannot be read, or has no end token.
    """
    # Its import advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes a second to import: only where a tokenizer is loaded

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make one without a vocabulary, from config.json alone.
        raise TokenizerError(f"{path} must hold a tokenizer, one of {', '.join(_TOKENIZER_FILES)}: it holds none")
    try:
        # Whatever the tokenizer's own config says, completions are decoded as they are.
        tokenizer = AutoTokenizer.from_pretrained(str(path), clean_up_tokenization_spaces=False)
        tokenizer("a", add_special_tokens=False)  # some fields are only read now
    except Exception as error:
        # Damaged or newer files make tokenizers raise Exception itself, and transformers any kind.
        reason = " ".join(str(error).split())[:500]
        raise TokenizerError(
            f"the tokenizer of {path} cannot be loaded: {type(error).__name__}: {reason}. Are its files there, whole, "
            f"and of a version that tokenizers {metadata.version('tokenizers')} reads?"
        ) from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer of {path} must have an eos_token, which ends a completion: it has none")
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill padding with. Lengths say where a sequence ends, so any id will do."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(pad) if isinstance(pad, int) else int(end) if isinstance(end, int) else 0


def end_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, config_ids: Iterable[int]) -> tuple[int, ...]:
    """Every token id that ends a completion: the tokenizer's, config.json's and generation_config.json's together.

    Args:
        tokenizer: the policy's.
        folder: of the policy.
        config_ids: those of config.json.

    Returns:
        Ids in ascending order.

    Raises:
        TokenizerError: generation_config.json cannot be read.
    """
    file = folder / "generation_config.json"
    given: Any = None
    if file.is_file():
        try:
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise TokenizerError(f"{file} must be a JSON object: {error}") from error
    listed = given if isinstance(given, list) else [given] if given is not None else []
    if wrong := [value for value in listed if not isinstance(value, int) or isinstance(value, bool) or value < 0]:
        raise TokenizerError(f"{file}: eos_token_id must hold token ids: got {wrong[0]!r}")
    own = tokenizer.eos_token_id
    return tuple(sorted({*config_ids, *listed, *([own] if isinstance(own, int) else [])}))
