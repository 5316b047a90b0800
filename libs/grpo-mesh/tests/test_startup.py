"""What is settled before the first array: forced devices, the compilation cache, huge pages."""

import json
import os
import subprocess
import sys

import jax
import pytest

from grpo_mesh import HostsError, force_cpu_devices, has_huge_pages, restart_with_huge_pages, use_compilation_cache

FLAG = "--xla_force_host_platform_device_count"


@pytest.fixture
def environment(monkeypatch):
    """Lets a test change the variables that are read and written here."""
    for name in ("XLA_FLAGS", "GLIBC_TUNABLES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_forced_devices_join_the_flags_that_are_there(environment):
    environment.setenv("XLA_FLAGS", "--xla_dump_to=x")
    environment.setattr("grpo_mesh._runtime.backend_started", lambda: False)
    for _ in range(2):
        force_cpu_devices(3)
        assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {FLAG}=3"


def test_contradicting_flags_are_refused(environment):
    environment.setenv("XLA_FLAGS", f"{FLAG}=8")
    with pytest.raises(HostsError, match="cpu_devices is 2 but XLA_FLAGS asks for 8: unset it, or make them agree"):
        force_cpu_devices(2, setting="cpu_devices")


def test_devices_are_forced_before_jax_starts_them(environment):
    jax.devices()
    with pytest.raises(HostsError, match="force_cpu_devices=2 must be set before jax starts its devices"):
        force_cpu_devices(2)
    with pytest.raises(HostsError, match="force_cpu_devices must be at least 1: got 0"):
        force_cpu_devices(0)


def test_a_cache_needs_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostsError, match="compilation_cache must be a writable folder"):
        use_compilation_cache(tmp_path / "file" / "cache", setting="compilation_cache")


def test_jax_sees_devices_and_cache(tmp_path):
    script = (
        "import sys, json, jax\nfrom grpo_mesh import force_cpu_devices, use_compilation_cache\n"
        "force_cpu_devices(3)\nfolder = use_compilation_cache(sys.argv[1])\n"
        "jax.jit(lambda x: x + 1)(1.0)\nprint(json.dumps([jax.device_count('cpu'), str(folder)]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(tmp_path / "a" / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [3, str(tmp_path / "a" / "b")]
    assert any((tmp_path / "a" / "b").iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_huge_pages_restart_the_same_command_once(environment):
    script = (
        "import os, sys\nfrom grpo_mesh import has_huge_pages, restart_with_huge_pages\n"
        "print(os.getpid(), has_huge_pages(), *sys.argv[1:], flush=True)\nrestart_with_huge_pages()\n"
        "print(os.environ['GLIBC_TUNABLES'])\n"
    )
    given = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.check=0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-X", "dev", "-c", script, "one", "two words"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given)
    first, second, tunables = done.stdout.splitlines()
    assert tunables == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    number = first.split()[0]
    assert first == f"{number} False one two words"
    assert second == f"{number} True one two words"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_huge_pages_restart_another_command(environment):
    started = []
    environment.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    restart_with_huge_pages(["python", "train.py"])
    ((program, arguments, variables),) = started
    assert (program, arguments) == ("python", ["python", "train.py"])
    assert variables["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    environment.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    restart_with_huge_pages()
    assert has_huge_pages()
    assert len(started) == 1
