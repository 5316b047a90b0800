"""The shapes and types written in signatures hold while the laws are checked."""

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the hook must be there before the library is imported, and the other tests pass arguments
# that are wrong on purpose. Moments and LossTerms are left out: outside of `vmap` their fields have one more axis.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from jaxtyping import install_import_hook
modules = "advantages aggregate importance kl objectives policy_loss returns sequences token_masks".split()
install_import_hook([f"grpo_loss._{name}" for name in modules], "beartype.beartype")
import grpo_loss, grpo_loss_laws, jax
with jax.enable_x64(True):
    for check in grpo_loss_laws.CHECKS:
        check(grpo_loss)
    for case in grpo_loss_laws.CASES[::4]:
        grpo_loss_laws.check_policy_loss(grpo_loss, case)
"""


@pytest.mark.slow
def test_annotations_hold():
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
