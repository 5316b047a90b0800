"""A toy policy for every test that trains, and compiled programs kept between sessions."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest

# `reward.functions=[graders:moody]` is found as a user's module is: reward processes get this process's path.
sys.path.append(str(Path(__file__).parent))

from toy import make_policy

from grpo_mesh import use_compilation_cache
from grpo_trainer.settings.schema import Settings

use_compilation_cache(Settings().compilation_cache)

# No test times anything: a busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Hugging Face layout."""
    return make_policy(tmp_path_factory.mktemp("toy-policy"))
