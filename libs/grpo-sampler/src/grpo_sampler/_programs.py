"""Compiled programs, counted: each is compiled ahead of its call, so nothing can recompile unnoticed."""

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jax.stages import Lowered

Options = Mapping[str, str | bool] | None


class Programs:
    """A table of ahead-of-time compiled programs; several compile at once in background threads."""

    def __init__(self, workers: int = 2) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grpo-sampler-compile")
        self._table: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Programs compiled so far, those under way included."""
        return len(self._table)

    def start(self, key: Hashable, lower: Callable[[], Lowered], options: Options = None) -> Future[Any]:
        """Begins compiling a program unless that has happened already.

        Args:
            key: all that the program's shapes and code depend on.
            lower: traces.
            options: of the compiler; as much part of a program as its key.
        Returns:
            A future of the compiled program.
        """
        whole = key, tuple(sorted((options or {}).items()))
        with self._lock:
            if whole not in self._table:
                self._table[whole] = self._pool.submit(lambda: lower().compile(dict(options or {}) or None))
            return self._table[whole]
