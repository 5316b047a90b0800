"""Registers the stages as pytrees: `import grpo_contracts.jax` once, and batches pass through jit, vmap and shardings.

Arrays are leaves; sizes, the law and the names are static: plain Python inside jit, where a change of them recompiles.
The policy's identity is leaves too, so that a new one does not. Outside, `jax.device_get(batch)` turns it back into an
int and a str; so does `policy.concrete()`.
"""

from . import _pytrees as _pytrees

__all__: list[str] = []
