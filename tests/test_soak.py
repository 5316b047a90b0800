"""A disturbed run ends as an undisturbed one. `tools/soak.py --minutes 120` is the long version."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "tools/soak.py"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits other processes")

# What a trainer does, as far as the soak looks at it, and ways to be wrong.
STUB = """
import json, os, pathlib, signal, subprocess, sys, time
wrong = "WRONG"
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--set=run.dir=")).partition("run.dir=")[2])
stop = []
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: stop.append(1))
code = "import time; time.sleep(120)" if wrong == "orphan" else "import sys; sys.stdin.read()"
subprocess.Popen([sys.executable, "-S", "-c", code, "grpo_trainer.rewards.worker"], stdin=-1, start_new_session=True)

def write(name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    part = folder / (name + ".part")
    part.write_text(text)
    part.replace(folder / name)

state = folder / "state.json"
step, total = json.loads(state.read_text()) if state.exists() else (0, 0)
if wrong == "forgetful" and 0 < step < 40:
    total += 1
try:
    while step < 40:
        time.sleep(0.05)
        step, total = step + 1, (31 * total + step) % 1000003
        write("state.json", json.dumps([step, total]) + " " * 2_000_000)
        print(f"step {step}/40 ", flush=True)
        if stop:
            sys.exit(3 if wrong == "another code" else 75)
    write("metrics.jsonl", json.dumps({"step": step, "total": total, "time": time.time()}))
    write("summary.json", json.dumps({"steps": step, "state_digest": total, "seconds": time.time()}))
    write("completions.jsonl", "")
    write("export/model.safetensors", str(total))
except OSError as error:
    if wrong == "traceback":
        raise
    sys.exit(f"cannot be written: {error}")
"""


def soak(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOAK), "--out", str(folder / "soak"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("nothing", "each equal to the undisturbed one"),
        pytest.param("orphan", "live on", marks=pytest.mark.slow),
        pytest.param("forgetful", "differs from", marks=pytest.mark.slow),
        pytest.param("another code", "ended with code 3 after SIG", marks=pytest.mark.slow),
        pytest.param("traceback", "shows a traceback after full disk", marks=pytest.mark.slow),
    ],
)
def test_the_soak_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, words: str) -> None:
    (tmp_path / "stub_trainer.py").write_text(STUB.replace("WRONG", wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    minutes = "0" if wrong == "nothing" else "1"  # it ends at the first thing that it finds
    done = soak(tmp_path, "--app", "stub_trainer", "--minutes", minutes, "--seed", "1")
    assert words in done.stdout + done.stderr
    assert done.returncode == (wrong != "nothing"), done.stdout + done.stderr


@pytest.mark.slow
def test_ten_minutes_of_kills_full_disks_and_clock_jumps(tmp_path: Path) -> None:
    small = ["steps=20", "eval.problems=64", "eval.every=10", "rollout.prompts=8"]
    done = soak(tmp_path, "--minutes", "10", "--seed", "1", "--set", *small, f"compilation_cache={tmp_path / 'jax'}")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each equal to the undisturbed one" in done.stdout
