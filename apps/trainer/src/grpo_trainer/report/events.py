"""A run's numbers for TensorBoard."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

__all__ = ["Events"]

_Event: Any = getattr(event_pb2, "Event")  # noqa: B009  protobuf makes them when it is imported
_SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009
_Summary: Any = getattr(summary_pb2, "Summary")  # noqa: B009


class Events:
    """One file of events, each of which is in the file when its call returns.

    tensorboardX's SummaryWriter writes in a thread of its own: a failed write is a traceback there and no error here,
    and the thread dies when the clock is set back. What its file buffers on a full disk fails once more at the end.

    Args:
        folder: is made; its other files are kept.
        suffix: of the file's name, which otherwise holds the second only: a run that is resumed within it would
            overwrite.
        purge: TensorBoard hides what earlier files say of this step and later ones; None hides nothing.

    Raises:
        OSError: it cannot be written, here and in `scalars`.
    """

    def __init__(self, folder: Path, *, suffix: str, purge: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}{suffix}"
        self._file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._write(file_version="brain.Event:2")
            if purge is not None:
                self._write(step=purge, session_log=_SessionLog(status=_SessionLog.START))
        except OSError:
            self.close()
            raise

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one step's numbers: one event with all of them, as an event a number takes 3 to 5 ms a step."""
        values = [_Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=_Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, **fields: Any) -> None:
        event = _Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        left = memoryview(length + _checksum(length) + event + _checksum(event))
        while left:
            left = left[os.write(self._file, left) :]


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
