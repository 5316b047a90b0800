"""Reward functions of one's own, found by name.

A reward function has the signature ``f(*, prompts, completions, answers, **extra) -> list[float | None]``: one value a
completion, None where it cannot be judged. It gets the questions, the texts of the completions without their stop
tokens, and the data set's ``answer`` fields, all as they are; ``extra`` holds ``finished`` (a list of bool: did the
completion end by itself), ``lengths`` (tokens of each completion), ``step``, every further column of the data set by
its name, and whatever later versions add. It must judge each completion by itself: after a failure it is called again
with one completion at a time (see `workers`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import cast

from grpo_contracts import GrpoError, RewardFunction

__all__ = ["RewardError", "load_function"]


class RewardError(GrpoError, ValueError):
    """A reward function cannot be found, or too many completions have no reward."""


def load_function(name: str) -> RewardFunction:
    """Find a reward function.

    Args:
        name: ``module:function``; the working directory is searched too.

    Returns:
        The function.

    Raises:
        RewardError: if there is none of that name; says which part of it is missing.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise RewardError(f"a reward function of your own must be named module:function: got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a file beside the command is what people mean by `my_module`
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = "it" if error.name == module_name else f"the module {error.name!r} that it imports"
        raise RewardError(
            f"reward function {name!r}: module {module_name!r} cannot be imported, {missing} was not found. "
            f"Looked in {here} and the environment"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise RewardError(
            f"reward function {name!r}: module {module_name!r} has no {attribute!r}; "
            f"it has {', '.join(public) or 'no functions'}"
        )
    if not callable(function):
        raise RewardError(f"reward function {name!r} must be callable: got {type(function).__name__}")
    return cast(RewardFunction, function)
