"""Reward functions that raise, hang, crash and answer nonsense: what they touch is unscored, everything else is not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import graders
import pytest

from grpo_trainer.rewards.functions import RewardError
from grpo_trainer.rewards.worker import call_function
from grpo_trainer.rewards.workers import RewardWorker


def given(*completions: str) -> dict[str, Any]:
    return {
        "prompts": ["q"] * len(completions),
        "completions": list(completions),
        "answers": ["#### 1"] * len(completions),
        "finished": [True] * len(completions),
        "step": 3,
    }


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def descendants(pid: int) -> list[int]:
    """This process and all below it."""
    command = ["ps", "--ppid", str(pid), "-o", "pid="]
    children = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


@pytest.fixture(scope="module")
def moody() -> RewardWorker:
    return RewardWorker("graders:moody", timeout=8.0)


def test_what_a_function_returns_and_prints(moody: RewardWorker) -> None:
    assert moody.judge(given("a", "\ud800 \n☃", "none")) == ([0.5, 0.5, None], [])


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("raise", "exception", r"raised KeyError: 'gold' (graders.py:"),
        ("exit", "exception", "raised SystemExit: enough"),
        ("die", "crash", "ended with code 3"),
        ("segfault", "crash", "died of SIGSEGV"),
        ("hang", "timeout", "longer than 1 s"),
        ("spin", "timeout", "longer than 1 s"),
        ("nan", "shape", "finite numbers or None: got nan"),
        ("text", "shape", "finite numbers or None: got '1.0'"),
    ],
)
def test_one_bad_completion_costs_one_completion(moody: RewardWorker, text: str, kind: str, message: str) -> None:
    values, failures = moody.judge(given("a", text, "b"))
    assert values == [0.5, None, 0.5]
    (failure,) = failures
    assert (failure.kind, failure.rows) == (kind, (1,))
    assert message in failure.message
    if kind in ("crash", "timeout"):
        assert "graders.py" in failure.output or "last words" in failure.output  # where it hung or crashed
    assert moody.judge(given("a")) == ([0.5], [])  # and it serves again


def test_a_wrong_length_is_asked_for_again_one_by_one() -> None:
    values, failures = RewardWorker("graders:short", timeout=5.0).judge(given("a", "b", "c"))
    assert values == [1.0, 1.0, 1.0]
    (failure,) = failures
    assert (failure.kind, failure.rows) == ("shape", ())
    assert "must return a list of 3 rewards, one a completion: got [1.0, 1.0]" in failure.message


def test_a_step_costs_at_most_twice_the_timeout() -> None:
    worker = RewardWorker("graders:slow", timeout=2.0)
    values, failures = worker.judge(given(*["a"] * 60))
    # All of them take three seconds.
    assert "not reached within 2 s (reward.timeout) after the whole batch took longer" in failures[-1].message
    assert failures[-1].kind == "timeout"
    assert values[0] == 1.0
    assert values.count(1.0) <= 40  # a twentieth of a second each
    assert {row for failure in failures for row in failure.rows} == {n for n, v in enumerate(values) if v is None}


def test_processes_import_no_jax_and_end_with_their_worker() -> None:
    worker = RewardWorker("graders:whereabouts", timeout=5.0)
    ((pid,), _) = worker.judge(given("a"))
    assert pid is not None
    assert pid == int(pid), "the process must not import jax"
    assert alive(int(pid))
    del worker
    gc.collect()
    assert gone(int(pid))
    with pytest.raises(ChildProcessError):
        os.waitpid(int(pid), os.WNOHANG)  # no zombie


@pytest.mark.parametrize(("text", "kind"), [("child", "timeout"), ("daemon", "crash")])
def test_what_a_function_started_dies_with_it_and_delays_nobody(text: str, kind: str) -> None:
    worker = RewardWorker("graders:moody", timeout=2.0)
    values, failures = worker.judge(given(text))
    assert (values, failures[0].kind) == ([None], kind)
    ((_, child),) = (line.split() for line in failures[0].output.splitlines() if line.startswith("child"))
    assert gone(int(child))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its pipes in /proc")
def test_only_the_reply_to_a_request_is_its_reply(moody: RewardWorker) -> None:
    assert moody.judge(given("forge")) == ([0.5], [])
    values, (failure,) = moody.judge(given("garble"))
    assert values == [None]
    assert (failure.kind, "sent something that is not a reply" in failure.message) == ("crash", True)
    assert moody.judge(given("a")) == ([0.5], [])


def test_messages_are_cut_and_escaped_where_they_arise(moody: RewardWorker) -> None:
    _, (failure,) = moody.judge(given("loud"))
    assert failure.message.startswith("raised ValueError: \\x1b]0;title\\x07xxx")
    assert len(failure.message) < 3_000
    assert failure.message.isprintable()


def test_memory_is_limited() -> None:
    worker = RewardWorker("graders:moody", timeout=20.0, memory=500_000_000)
    values, (failure,) = worker.judge(given("a", "large", "b"))
    assert values == [0.5, None, 0.5]
    assert failure.kind == "exception"
    assert "raised MemoryError" in failure.message
    assert "reward.memory" in failure.message
    assert RewardWorker("graders:moody", timeout=20.0).judge(given("large")) == ([1.0], [])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("column", None, "list of 3 rewards, one a completion: got an array of shape (3, 1)"),
        ("scalar", None, "list of 3 rewards, one a completion: got a single number, "),
        ("set", None, "list of 3 rewards, one a completion: got {1.0, 2.0, 3.0}"),
        ("mapping", None, "list of 3 rewards, one a completion: got {0: 1.0"),
        ("endless", None, "list of 3 rewards, one a completion: got count("),
        ("strings", None, "list of 3 rewards, one a completion: got '123'"),
        ("large", [None, 2.0, None], "finite numbers or None: got 1e+39"),
        ("infinite", [None, 2.0, None], "finite numbers or None: got inf"),
        ("rows", [None, 2.0, None], "finite numbers or None: got array([1., 1.])"),
        ("scalars", [0.5, 1.0, 3.0], ""),
        ("array", [0.5, 1.0, 3.0], ""),
    ],
)
def test_what_counts_as_rewards(name: str, values: list[float | None] | None, message: str) -> None:
    reply = call_function(graders.returns, given("a", "b", "c") | {"prompts": [name] * 3})
    assert reply.get("values") == values
    said = (
        [reply["message"]]
        if values is None
        else [f"finite numbers or None: got {text}" for text in reply["wrong"].values()]
    )
    assert any(message in text for text in said) if message else not said


def test_a_worker_serves_any_thread() -> None:
    worker = RewardWorker("graders:moody", timeout=4.0)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda text=text: results.append(worker.judge(given(text))[0]))
        for text in ("a", "hang", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [[0.5], [0.5], [None]]


@pytest.mark.parametrize("text", ["a", "spin", "child"])
def test_no_orphan_outlives_a_killed_trainer(tmp_path: Path, text: str) -> None:
    script = textwrap.dedent(f"""
        import sys
        sys.path.append({str(Path(__file__).parent)!r})
        from grpo_trainer.rewards.workers import RewardWorker
        worker = RewardWorker("graders:moody", timeout=100.0)
        print(worker._process.pid, flush=True)
        worker.judge({given(text)!r})
        print("judged", flush=True)
        sys.stdin.read()
    """)
    trainer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    supervisor = int(trainer.stdout.readline())
    if text == "a":
        trainer.stdout.readline()
    processes = descendants(supervisor)
    while text == "child" and len(processes) < 3:
        processes = descendants(supervisor)
    trainer.kill()
    trainer.wait()
    assert len(processes) >= 2
    assert all(gone(pid) for pid in processes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(**_): return", "has no 'grade'; it has f"),
        ("import not_there_at_all", "'not_there_at_all' that it imports was not found"),
        ("1 / 0", "importing its module raised ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('no')", "importing its module raised SystemExit: no"),
        ("def grade(:", "importing its module raised"),
        ("print('so be it', flush=True); import os; os._exit(5)", "ended with code 5"),
    ],
)
def test_functions_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "my_own.py").write_text(source + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=r"reward function 'my_own:grade'") as caught:
        RewardWorker("my_own:grade", timeout=1.0)
    assert message in str(caught.value)


def test_a_reward_process_imports_nothing_heavy() -> None:
    heavy = "{'jax', 'optax', 'flax', 'grain'} & set(sys.modules)"
    script = f"import sys, grpo_trainer.rewards.worker; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
