"""What a process settles before its first array: forced CPU devices, the compilation cache, huge pages.

All of it works after `import jax`, which starts no devices. Each function has an effect on the whole process, so the
caller should print what it asked for: nothing may change a run silently.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from grpo_mesh import _runtime
from grpo_mesh._errors import HostsError

FORCED_DEVICES = "--xla_force_host_platform_device_count"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def force_cpu_devices(count: int, *, setting: str = "force_cpu_devices") -> None:
    """Divides the CPU into several jax devices, through XLA_FLAGS. Processes started later inherit them.

    Args:
        count: how many devices.
        setting: the user's name for the count, for error messages.

    Raises:
        HostsError: the count is not positive, XLA_FLAGS asks for another number, or jax has started its devices.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise HostsError(f"{setting} must be at least 1: got {count}.")
    flags = os.environ.get("XLA_FLAGS", "")
    given = re.search(rf"{FORCED_DEVICES}=(\d+)", flags)
    if given and int(given[1]) != count:
        raise HostsError(f"{setting} is {count} but XLA_FLAGS asks for {given[1]}: unset it, or make them agree.")
    if given:
        return
    if _runtime.backend_started():
        raise HostsError(
            f"{setting}={count} must be set before jax starts its devices: move it before the first array and before "
            "the first call that counts devices, or leave the CPU as it is."
        )
    os.environ["XLA_FLAGS"] = f"{flags} {FORCED_DEVICES}={count}".strip()


def use_compilation_cache(folder: str | os.PathLike[str], *, setting: str = "the compilation cache") -> Path:
    """Keeps compiled programs in a folder, small ones included, for the next process.

    Args:
        folder: made if absent; "~" is the home folder.
        setting: the user's name for the folder, for error messages.

    Returns:
        The absolute path of the folder.

    Raises:
        HostsError: the folder cannot be made.
    """
    if not isinstance(folder, str | os.PathLike):
        raise HostsError(f"{setting} must be a folder: got a {type(folder).__name__}.")
    try:
        path = Path(folder).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # also no such user, and null characters
        raise HostsError(f"{setting} must be a writable folder: {error}.") from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Small programs are most of a small run's compilation: keep them all, not only those that took a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def has_huge_pages() -> bool:
    """Returns whether this process was started with glibc's huge pages."""
    return _HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "")


def restart_with_huge_pages(command: Sequence[str] | None = None) -> None:
    """Replaces this process by the same command with glibc's huge pages, which make large host arrays faster.

    glibc reads the setting, in GLIBC_TUNABLES, only when a process starts. Returns at once if the setting is there
    already or this is not Linux; call it first of all.

    Args:
        command: the program and its arguments; None: this process's (`sys.orig_argv`).
    """
    if has_huge_pages() or not sys.platform.startswith("linux"):
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, _HUGE_PAGES]))}
    sys.stdout.flush()
    sys.stderr.flush()
    program, *arguments = [sys.executable, *sys.orig_argv[1:]] if command is None else command
    os.execvpe(program, [program, *arguments], environment)
