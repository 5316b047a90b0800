"""Whatever these tests are started with."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def heed_sighup() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, and so it would be in every process that a test starts and hangs up on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
