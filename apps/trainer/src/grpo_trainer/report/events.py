"""A run's numbers for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

__all__ = ["Events"]

_Event: Any = getattr(event_pb2, "Event")  # noqa: B009  protobuf makes them when it is imported
_SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009
_Summary: Any = getattr(summary_pb2, "Summary")  # noqa: B009


class Events:
    """One file of events, written by the caller's thread.

    tensorboardX's SummaryWriter writes in a thread of its own: a failed write is a traceback there and no error here,
    and the thread dies when the clock is set back.

    Args:
        folder: is made; its other files are kept.
        suffix: of the file's name, which else holds the second only: a run that is resumed within it would overwrite.
        purge: TensorBoard hides what earlier files say of this step and later ones; None: nothing.

    Raises:
        OSError: it cannot be written, here and in all methods.
    """

    def __init__(self, folder: Path, *, suffix: str, purge: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), suffix)
        if purge is not None:
            self._write(step=purge, session_log=_SessionLog(status=_SessionLog.START))

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one step's numbers: one event with all of them, as an event a number takes 3 to 5 ms a step."""
        values = [_Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=_Summary(value=values))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(_Event(wall_time=time.time(), **fields))
