"""Whatever these tests are started with."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def heed_signals() -> Iterator[None]:
    """SIGHUP is ignored under nohup and SIGINT in a shell's background, and so they would be in what a test starts."""
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
