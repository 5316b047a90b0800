"""A program as the TPU compiler schedules it: its text and its buffers, without waiting for the code.

The compiler writes both before it generates code, which takes nineteen twentieths of its time and changes neither.
"""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import tempfile
import threading
from pathlib import Path

from jax.stages import Compiled, Lowered

from grpo_mesh._report import DUMP_AS_TEXT, Memory, memory_of, read_back, read_dump

_LAST = "*after_optimizations_after_buffer_assignment.txt"  # what the compiler writes last before it generates code
_BUFFERS = "*after_optimizations-buffer-assignment.txt"
_BUFFER = re.compile(r"^allocation \d+: size (\d+), (color \d+, )?.*?:$", re.MULTILINE)
_POLL_SECONDS = 0.02


def schedule(lowered: Lowered) -> tuple[str, Memory]:
    """Compiles a program up to where its code would be generated, or to its end where that cannot be told apart.

    The compiler goes on in a thread that nothing can stop.

    Args:
        lowered: the program.

    Returns:
        Its text, and what it needs of a device's main memory; the code counts 0 where it was not waited for, and
        temporaries differ by less than a MiB: they are not rounded to pages, and some small ones may be dropped later.
    """
    folder = Path(tempfile.mkdtemp(prefix="grpo-mesh-"))
    try:
        compiling = _compile(lowered, folder)
        while not compiling.done():
            if any(folder.glob(_LAST)):
                buffers = max(folder.glob(_BUFFERS))
                return read_dump(folder), read_buffers(buffers.read_text())
            concurrent.futures.wait([compiling], _POLL_SECONDS)
        compiled = compiling.result()
        return read_dump(folder) or read_back(compiled), memory_of(compiled)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_buffers(text: str) -> Memory:
    """Adds up a buffer assignment as XLA writes it.

    Args:
        text: of the file.

    Returns:
        Sizes in main memory, without the code.
    """
    arguments = outputs = aliased = temporaries = 0
    for found in _BUFFER.finditer(text):
        size, elsewhere = int(found[1]), found[2]
        if elsewhere:
            continue  # on the chip: VMEM, SMEM, semaphores
        given, kept = ", parameter " in found[0], "maybe-live-out" in found[0]
        arguments += size * given
        outputs += size * kept
        aliased += size * (given and kept)
        temporaries += size * ("preallocated-temp" in found[0])
    return Memory(arguments, outputs, aliased, temporaries, code=0)


def _compile(lowered: Lowered, folder: Path) -> concurrent.futures.Future[Compiled]:
    """Compiles in a thread that does not keep the process from ending."""
    future: concurrent.futures.Future[Compiled] = concurrent.futures.Future()

    def compiles() -> None:
        try:
            future.set_result(lowered.compile(compiler_options={"xla_dump_to": str(folder), **DUMP_AS_TEXT}))
        except Exception as error:  # noqa: BLE001 - passed on to whoever waits
            future.set_exception(error)

    threading.Thread(target=compiles, name="grpo-mesh-compile", daemon=True).start()
    return future
