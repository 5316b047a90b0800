"""The display: plain lines in a pipe, a panel in a terminal, and model text that cannot steer either."""

import io
import os
import select
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_trainer.report.terminal import printable
from grpo_trainer.run.progress import Progress, duration

METRICS = {"reward": 0.5, "accuracy": 0.42, "tokens_per_second": 12345.6, "kl": 0.1}


def shown(**options) -> list[str]:
    stream = io.StringIO()
    with Progress(3, stream=stream, **options) as progress:
        progress.note("before: 40 %")
        for step in (1, 2, 3):
            with progress.phase("rollout"):
                pass
            progress.step(step, METRICS)
    return stream.getvalue().splitlines()


def test_one_line_a_step_without_a_terminal():
    lines = shown()
    assert lines[0] == "before: 40 %"
    assert lines[1].startswith("step 1/3  reward 0.500  accuracy 42.0%  tokens/s 12,346  left ")
    assert len(lines) == 4
    assert lines[3].endswith("left 0 s")
    assert not any("\x1b" in line for line in lines)


def test_quiet_shows_the_first_and_the_last():
    assert [line.split()[1] for line in shown(quiet_seconds=1000.0)[1:]] == ["1/3", "3/3"]


def test_disabled_says_nothing():
    assert shown(enabled=False) == []


def test_time_left_counts_only_steps_of_this_process():
    stream = io.StringIO()
    with Progress(100, stream=stream) as progress:
        progress.resume(98)
        progress.step(99, METRICS)
    assert stream.getvalue().rstrip().endswith("left 0 s")


def test_time_left_forgets_the_step_that_compiled(monkeypatch):
    clock = iter([0.0, 0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr("grpo_trainer.run.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress(13, stream=stream) as progress:
        for step in (1, 2, 3):
            progress.step(step, {})
    assert [line.split("left ")[1] for line in stream.getvalue().splitlines()] == ["20:00", "22 s", "20 s"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_panel_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        with Progress(3, stream=terminal) as progress, progress.phase("rollout"):
            progress.step(1, METRICS)
            progress.note("a\x1b[2Jb")
        terminal.flush()
        written = ""
        while select.select([master], [], [], 1.0)[0]:  # a terminal hands it over in pieces
            written += os.read(master, 100_000).decode()
    os.close(master)
    assert "step 1/3" in written
    assert "accuracy" in written
    assert "a\\x1b[2Jb" in written


def test_a_failing_run_leaves_the_terminal_alone():
    with pytest.raises(ZeroDivisionError), Progress(3, stream=io.StringIO()) as progress, progress.phase("update"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7509, "2:05:09")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_printable():
    assert printable("5 + 3\t= 8\n") == "5 + 3\t= 8\n"
    assert printable("\x1b]0;title\x07\r\x9b1m") == "\\x1b]0;title\\x07\\r\\x9b1m"
    assert printable("\u202edesrever\u200b\u2028") == "\\u202edesrever\\u200b\\u2028"
    assert printable("\ud800") == "\\ud800"
    assert printable("a\nb", newlines=False) == "a\\nb"
    assert printable("größer 你好 🙂") == "größer 你好 🙂"


@given(st.text(st.characters(), max_size=50))
def test_nothing_that_acts_is_left(text):
    safe = printable(text)
    safe.encode("utf-8")
    assert not any(ord(char) < 32 and char not in "\n\t" for char in safe)
    assert not any(0x7F <= ord(char) < 0xA0 for char in safe)
