"""What must be settled before jax is imported: forced devices, the compilation cache, huge pages.

Each is a setting, and each is said in the run's first lines: no environment variable changes a run silently.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_trainer.settings.schema import Config

__all__ = ["before_jax", "with_huge_pages"]

_DEVICES = "--xla_force_host_platform_device_count"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Variables that jax and its compilers listen to; whoever set them should read so in the run's output.
_HEARD = ("JAX_", "XLA_", "LIBTPU_", "TF_XLA_")


def before_jax(config: Config) -> list[str]:
    """Set up the environment that jax reads when it is imported.

    Args:
        config: of the run.

    Returns:
        Lines that tell the reader of the run's output what was set.

    Raises:
        ConfigError: jax is imported already, XLA_FLAGS contradicts cpu_devices, or the cache cannot be written.
    """
    from grpo_trainer.settings.errors import ConfigError

    given_by_user = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_HEARD)]
    lines = [f"environment  {setting}" for setting in given_by_user]
    if config.cpu_devices:
        flags = os.environ.get("XLA_FLAGS", "")
        given = re.search(rf"{_DEVICES}=(\d+)", flags)
        if given and int(given[1]) != config.cpu_devices:
            raise ConfigError(
                f"cpu_devices is {config.cpu_devices} but XLA_FLAGS asks for {given[1]}: unset it, or make them agree"
            )
        if not given:
            if "jax" in sys.modules:
                raise ConfigError(
                    f"cpu_devices={config.cpu_devices} must be set before jax is imported: start the run by "
                    "`grpo-gsm8k train`, or set cpu_devices=0"
                )
            os.environ["XLA_FLAGS"] = f"{flags} {_DEVICES}={config.cpu_devices}".strip()
        lines.append(f"devices      {config.cpu_devices} forced out of the CPU (cpu_devices)")
    if config.compilation_cache:
        folder = Path(config.compilation_cache).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"compilation_cache must be a writable folder, or empty for none: {error}") from error
        _configure_cache(str(folder))
        lines.append(f"cache        {folder} (compilation_cache)")
    if config.huge_pages:
        on = _HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "")
        lines.append(f"huge pages   {'on' if on else 'not available on ' + sys.platform} (huge_pages)")
    return lines


def with_huge_pages(config: Config, arguments: Sequence[str]) -> None:
    """Replace this process by the same command under GLIBC_TUNABLES, if asked for and not done yet.

    glibc reads the setting when a process starts, so it cannot be changed from within.

    Args:
        config: of the run.
        arguments: of the command line, to be run again.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not config.huge_pages or not sys.platform.startswith("linux") or _HUGE_PAGES in tunables:
        return
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, _HUGE_PAGES]))}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", "grpo_trainer.cli", *arguments], environment)


def _configure_cache(folder: str) -> None:
    # Small programs are most of a small run's compilation: keep them all, not only those above jax's one second.
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if "jax" in sys.modules:
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)
    else:
        os.environ.update({name.upper(): str(value) for name, value in settings.items()})
