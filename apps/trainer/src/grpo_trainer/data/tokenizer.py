"""The policy's tokenizer, loaded and checked for what training needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_contracts import GrpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizerError", "load_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class TokenizerError(GrpoError, ValueError):
    """A tokenizer cannot be made, or lacks something that training needs."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load any Hugging Face tokenizer.

    Args:
        path: a folder or a hub id.

    Returns:
        The tokenizer, with an end token, a padding token and a chat template.

    Raises:
        TokenizerError: if it cannot be read, or has no end token, no token to pad with other than its end token, or
            no chat template.
    """
    # Its import advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes a second to import: only where a tokenizer is loaded

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make one without a vocabulary, from config.json alone.
        raise TokenizerError(f"{path} must hold a tokenizer, one of {', '.join(_TOKENIZER_FILES)}: it holds none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"the tokenizer of {path} cannot be loaded: {error}. Are its files there, and whole?"
        ) from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer of {path} must have an eos_token, which ends a completion: it has none")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise TokenizerError(
            f"the tokenizer of {path} must have a pad_token other than its eos_token {tokenizer.eos_token!r}: "
            f"got {tokenizer.pad_token!r}. Set pad_token in its tokenizer_config.json to an unused token"
        )
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"the tokenizer of {path} must have a chat_template: it has none. Use an instruction-tuned model"
        )
    return tokenizer
