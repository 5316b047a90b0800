"""Registers the stages as pytrees: `import grpo_contracts.jax` once, and batches pass through jit, vmap and shardings.

Arrays are leaves. Sizes, sampling parameters and names are static: plain Python inside jit, which recompiles when they
change. The policy version consists of leaves, so that a new one does not recompile. Outside jit,
`jax.device_get(batch)` and `policy.concrete()` turn it back into an int and a str.
"""

from . import _pytrees as _pytrees

__all__: list[str] = []
