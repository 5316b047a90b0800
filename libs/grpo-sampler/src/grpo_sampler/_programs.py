"""Compiled programs, counted: each is compiled ahead of time, so nothing recompiles unnoticed."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from jax.stages import Lowered


class Recipe(NamedTuple):
    """How to make a program: what traces and lowers it, and everything that its shapes and code depend on."""

    key: Hashable
    lower: Callable[[], Lowered]


class Programs:
    """A table of programs that are compiled ahead of time, several at once in background threads."""

    def __init__(self, workers: int = 2) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grpo-sampler-compile")
        self._table: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Programs compiled so far, including those still compiling."""
        return len(self._table)

    def start(self, recipe: Recipe) -> Future[Any]:
        """Starts compiling a program unless it has been started before.

        Args:
            recipe: of the program.
        Returns:
            A future of the compiled program.
        """
        with self._lock:
            if recipe.key not in self._table:
                self._table[recipe.key] = self._pool.submit(lambda: recipe.lower().compile())
            return self._table[recipe.key]
