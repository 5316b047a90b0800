"""What a person sees while a run goes on: a live panel in a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo_trainer.report.terminal import printable

__all__ = ["Progress", "duration"]

# Metric -> (label, format), in the order shown.
_SHOWN = {
    "reward": ("reward", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "eval/accuracy": ("held-out", "{:.1%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


class Progress:
    """Shows step, reward, accuracy, tokens/s, time left and the phase under way; a context manager.

    Args:
        steps: of the whole run.
        stream: where to write; None: standard output.
        quiet_seconds: without a terminal, at least this long between two steps' lines (the last is always shown).
        enabled: False shows nothing (every process but the first).
    """

    def __init__(
        self,
        steps: int,
        *,
        stream: TextIO | None = None,
        quiet_seconds: float = 0.0,
        enabled: bool = True,
    ) -> None:
        self._steps, self._step = steps, 0
        self._stream = sys.stdout if stream is None else stream
        self._quiet, self._enabled = quiet_seconds, enabled
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._latest: dict[str, float] = {}
        self._phase = "starting"
        self._begun = self._ended = time.monotonic()
        self._last_line = -math.inf
        self._recent: deque[float] = deque(maxlen=20)  # seconds of the last steps

    def __enter__(self) -> Self:
        self._begun = self._ended = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stderr=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._phase = "done" if error is None else "stopped"
            self._live.stop()
            self._live = None

    def resume(self, step: int) -> None:
        """Go on after `step`: the time left is judged by the steps this process does itself."""
        self._step = step
        self._ended = time.monotonic()
        self._recent.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what is under way (`rollout`, `reward`, `update`, `evaluation`, `checkpoint`) while the block runs."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done.

        Args:
            step: 1 for the first.
            metrics: names as in metrics.jsonl; those not shown are ignored.
        """
        self._step = step
        now = time.monotonic()
        self._recent.append(now - self._ended)
        self._ended = now
        self._latest |= {name: float(metrics[name]) for name in _SHOWN if name in metrics}
        if self._live is None and (step >= self._steps or now - self._last_line >= self._quiet):
            self._last_line = now
            shown = [f"{label} {text}" for label, text in self._values()]
            self._line("  ".join([f"step {step}/{self._steps}", *shown, f"left {self._left()}"]))

    def note(self, text: str) -> None:
        """Print a line above the panel; control characters are escaped."""
        if self._live is not None:
            self._console.print(Text(printable(text)))
        else:
            self._line(printable(text))

    def _line(self, text: str) -> None:
        if self._enabled:
            # Not through rich, which would wrap a line at 80 columns where there is no terminal.
            print(text, file=self._stream, flush=True)

    def _values(self) -> list[tuple[str, str]]:
        return [
            (label, form.format(self._latest[name])) for name, (label, form) in _SHOWN.items() if name in self._latest
        ]

    def _left(self) -> str:
        if not self._recent:
            return "?"
        # The first step compiles, and perhaps follows an evaluation: once there are others, they say more.
        usual = list(self._recent)[1:] if 1 < len(self._recent) < 20 else self._recent
        return duration(sum(usual) / len(usual) * (self._steps - self._step))

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._step}/{self._steps}", style="bold"),
            ProgressBar(total=self._steps, completed=self._step, width=32),
            Text(f"{duration(time.monotonic() - self._begun)} gone, {self._left()} left"),
            Text(self._phase, style="cyan"),
        )
        numbers = Table.grid(padding=(0, 3))
        values = self._values()
        if values:
            numbers.add_row(*[Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in values])
        return Group(head, numbers)


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3:07 or 2:05:09."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
