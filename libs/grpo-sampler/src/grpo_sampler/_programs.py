"""Compiled programs, counted: each is compiled ahead of time, so nothing recompiles unnoticed."""

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jax.stages import Lowered

Options = Mapping[str, str | bool] | None


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

    def start(self, key: Hashable, lower: Callable[[], Lowered], options: Options = None) -> Future[Any]:
        """Starts compiling a program unless it has been started before.

        Args:
            key: everything that the program's shapes and code depend on.
            lower: traces and lowers it.
            options: compiler options, which are part of the key.
        Returns:
            A future of the compiled program.
        """
        whole = key, tuple(sorted((options or {}).items()))
        with self._lock:
            if whole not in self._table:
                self._table[whole] = self._pool.submit(lambda: lower().compile(dict(options or {}) or None))
            return self._table[whole]
