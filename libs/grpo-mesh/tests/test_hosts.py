import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from grpo_mesh import HostsError, Job, _hosts, _runtime, barrier, check_agreement, deadline, initialize
from grpo_mesh._agree import disagreement
from grpo_mesh._hosts import _options, detect

JOB = Path(__file__).parent / "job_of_many.py"
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}  # fmt: skip
JOBSET = {
    "JOBSET_NAME": "grpo", "REPLICATED_JOB_NAME": "workers", "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "2",
    "JOBSET_JOBS": "2", "JOBSET_PODS": "4",
}  # fmt: skip
NOTHING = {"coordinator": None, "processes": None, "rank": None}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "single"),
        ({"GRPO_COORDINATOR": "a:1"} | SLURM, "explicit"),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, "single"),
        (JOBSET, "jobset"),
    ],
)
def test_the_environment_tells_the_kind_of_job(environment, kind):
    assert detect(environment) == kind


def test_a_jobset_pod_knows_its_rank_and_its_coordinator():
    seen, options = _options("jobset", NOTHING, JOBSET)
    assert seen == JOBSET
    assert options["coordinator_address"] == "grpo-workers-0-0.grpo:8476"
    assert (options["num_processes"], options["process_id"]) == (8, 6)


def test_arguments_come_before_the_environment_and_only_what_was_used_is_reported():
    environment = {"GRPO_COORDINATOR": "here:1", "GRPO_PROCESS_COUNT": "2", "GRPO_PROCESS_ID": "1"}
    seen, options = _options("explicit", NOTHING | {"coordinator": "there:2"}, environment)
    assert options["coordinator_address"] == "there:2"
    assert seen == {"GRPO_PROCESS_COUNT": "2", "GRPO_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("kind", "given", "environment", "message"),
    [
        ("explicit", {"rank": 0}, {}, r"missing coordinator \(or GRPO_COORDINATOR\), processes"),
        ("explicit", {"coordinator": "a:1", "processes": 2, "rank": 2}, {}, r"rank must lie in 0..1 .*got 2"),
        ("explicit", {"coordinator": "a", "processes": 2, "rank": 1}, {}, "coordinator must be host:port: got 'a'"),
        ("explicit", {"coordinator": "a:1", "processes": "two", "rank": 1}, {}, "processes must be a whole number"),
        ("slurm", {}, {"SLURM_JOB_ID": "7"}, "a slurm job sets .* missing SLURM_STEP_NODELIST"),
        ("jobset", {}, {}, "a jobset job sets .* missing JOBSET_NAME"),
    ],
)
def test_an_incomplete_environment_is_refused(kind, given, environment, message):
    with pytest.raises(HostsError, match=message):
        _options(kind, NOTHING | given, environment)


def test_one_process_needs_no_runtime():
    job = initialize("single")
    assert job == Job("single", 0, 1, None, {}, 10)
    assert "rank 0 of 1" in str(job)
    check_agreement({"seed": 1})
    barrier("start", 1)
    with deadline("update", 1):
        pass
    with pytest.raises(HostsError, match="kind must be one of"):
        initialize("mpi")


@pytest.mark.parametrize("seconds", [-1, 0, float("nan"), float("inf")])
def test_a_phase_without_time_is_refused(seconds):
    with pytest.raises(HostsError, match=r"phase 'x': seconds must be more than 0"), deadline("x", seconds):
        pass
    with pytest.raises(HostsError, match=r"phase 'x': seconds must be more than 0"):
        barrier("x", seconds)


def test_versions_of_jax_are_always_compared_and_others_if_named(monkeypatch):
    stored = {}
    monkeypatch.setattr(_runtime, "started", lambda: True)
    monkeypatch.setattr(_runtime, "rank", lambda: 0)
    monkeypatch.setattr(_runtime, "put", lambda key, value: stored.update({key.rpartition("/")[2]: value}))
    monkeypatch.setattr(_runtime, "entries", lambda folder: stored)
    monkeypatch.setattr("grpo_mesh._agree.barrier", lambda phase, seconds: None)
    for packages in ((), ("pytest", "no-such-package")):
        check_agreement({"seed": 1}, packages=packages)
        facts = json.loads(stored["0"])
        names = ("python", "jax", "jaxlib", "libtpu", "numpy", *packages)
        assert facts.keys() == {"seed", *(f"version.{name}" for name in names)}
        assert facts["version.jax"] == json.dumps(jax.__version__)
    assert facts["version.no-such-package"] == "null"


def test_a_fact_that_is_no_plain_value_is_refused():
    with pytest.raises(HostsError, match=r"fact 'config\.model' must be a plain value"):
        check_agreement({"config": {"model": object()}})


def test_the_odd_ranks_and_what_differs_are_named():
    facts = {rank: {"config.seed": "1", "version.jax": '"0.10.2"'} for rank in range(4)}
    assert disagreement(facts) is None
    facts[2] = {"config.seed": "2", "version.jax": '"0.10.2"', "extra": "1"}
    message = disagreement(facts)
    assert message is not None
    assert "odd: rank 2" in message
    assert "config.seed: rank 0, 1, 3: 1; rank 2: 2" in message
    assert "extra: rank 0, 1, 3: absent; rank 2: 1" in message
    assert "version.jax" not in message


def test_of_two_the_other_is_odd():
    assert "odd: rank 1." in str(disagreement({0: {"a": "1"}, 1: {"a": "2"}}))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:6029"),
            "another process of this job is gone (Connection closed by peer)",
        ),
        (ValueError("seed must be positive"), "ValueError, see above"),
    ],
)
def test_the_last_line_tells_a_dead_process_from_a_fault_of_ones_own(error, message, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(_hosts, "abort", lambda code, text: said.append((code, text)))
    _hosts._abort_on_exception(type(error), error, None)
    assert said == [(1, message)]
    assert str(error) in capsys.readouterr().err


def launch(mode, processes=2):
    command = [sys.executable, "-m", "grpo_mesh.launch", "--processes", str(processes), "--devices-per-process", "2"]
    return subprocess.run(
        [*command, "--grace", "1", "--", sys.executable, str(JOB), mode],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_two_processes_share_arrays_and_digests():
    done = launch("train")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"[{rank}] step 2: 2016.0" in done.stdout
    digests = re.findall(r"digest (\w+) (\w+) (\w+)", done.stdout)
    assert len(digests) == 2
    assert len({digest for line in digests for digest in line}) == 1


@pytest.mark.slow
def test_a_process_with_another_configuration_is_named_by_all():
    done = launch("disagree", processes=3)
    assert done.returncode == 1
    for rank in range(3):
        assert f"[{rank}]   config.seed: rank 0, 1: 0; rank 2: 1" in done.stdout
    assert "odd: rank 2." in done.stdout


@pytest.mark.slow
def test_a_process_that_stays_away_is_named():
    done = launch("stay_away")
    assert done.returncode == 1
    assert "phase 'update': all 2 processes must come within 2 s" in done.stdout
    assert "missing: rank 1 (rank 1 was last seen at 'start', visit 1)" in done.stdout


@pytest.mark.slow
def test_a_phase_that_hangs_ends_with_its_own_code():
    done = launch("stall")
    assert done.returncode == 124
    assert "phase 'update' must end within 2 s; not finished: rank 1 (at job_of_many.py:" in done.stdout
    assert "in stall)" in done.stdout


@pytest.mark.slow
def test_the_launcher_stops_all_when_one_fails():
    started = time.monotonic()
    done = launch("fail")
    assert done.returncode == 1
    assert "[1] ValueError: something broke" in done.stdout
    assert "rank 1 ended with code 1; stopping 1 more" in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill_last", "kill_first", "fail"])
def test_without_a_launcher_the_others_end_by_themselves(mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRPO_COORDINATOR": f"127.0.0.1:{port}", "GRPO_PROCESS_COUNT": "2"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    children = [
        subprocess.Popen(
            [sys.executable, str(JOB), mode],
            env=environment | {"GRPO_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    victim, survivor = (children[0], children[1]) if mode == "kill_first" else (children[1], children[0])
    try:
        victim.wait(60)
        died = time.monotonic()
        output, _ = survivor.communicate(timeout=60)
        assert survivor.returncode != 0
        assert time.monotonic() - died < 4 + 10  # heartbeat + 10 seconds, as documented
        assert "another task died" in output
    finally:
        for child in children:
            child.kill()
