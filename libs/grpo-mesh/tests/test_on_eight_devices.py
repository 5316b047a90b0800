import os
import subprocess
import sys
from pathlib import Path


def test_the_tests_that_need_eight_devices():
    # The number of CPU devices is fixed when jax starts, so they need a process of their own.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_eight_devices.py"]
    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
