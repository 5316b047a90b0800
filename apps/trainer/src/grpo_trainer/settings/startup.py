"""What must be settled before jax starts its devices, and how a run says so.

Each is a setting, and each is printed in the run's first lines: no environment variable changes a run silently.
"""

import os
import sys

from grpo_trainer.settings.schema import Settings

__all__ = ["prepare_process"]

# Variables that jax and its compilers read; whoever set them should see that in the run's output.
_READ_BY_JAX = ("JAX_", "XLA_", "LIBTPU_", "TF_XLA_")


def prepare_process(settings: Settings) -> list[str]:
    """Set up devices, compilation cache and memory pages as the settings say.

    Args:
        settings: resolved. `huge_pages` starts this process again, once.

    Returns:
        Lines that say what was set, and by whom.

    Raises:
        ConfigError: jax has started its devices already, XLA_FLAGS contradicts cpu_devices, or the cache cannot be
            written.
    """
    lines = [
        f"environment  {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_READ_BY_JAX)
    ]
    # Only now: they import jax or numpy, which `--print-config` does without.
    from grpo_mesh import HostsError, force_cpu_devices, has_huge_pages, restart_with_huge_pages, use_compilation_cache
    from grpo_trainer.settings.errors import ConfigError

    if settings.huge_pages:
        restart_with_huge_pages()
    try:
        if settings.cpu_devices:
            force_cpu_devices(settings.cpu_devices, setting="cpu_devices")
            lines.append(f"devices      {settings.cpu_devices} forced out of the CPU (cpu_devices)")
        if settings.compilation_cache:
            folder = use_compilation_cache(settings.compilation_cache, setting="compilation_cache")
            lines.append(f"cache        {folder} (compilation_cache)")
    except HostsError as error:
        raise ConfigError(str(error)) from error
    if settings.huge_pages:
        lines.append(f"huge pages   {'on' if has_huge_pages() else f'not available on {sys.platform}'} (huge_pages)")
    return lines
