"""Compiled programs, counted: each is compiled ahead of its call, so nothing can recompile unnoticed."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


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

    def start(self, key: Hashable, compile_now: Callable[[], Any]) -> Future[Any]:
        """Begins compiling a program unless that has happened already.

        Args:
            key: all that the program's shapes and code depend on.
            compile_now: traces and compiles.
        Returns:
            A future of the compiled program.
        """
        with self._lock:
            if key not in self._table:
                self._table[key] = self._pool.submit(compile_now)
            return self._table[key]
