"""The control experiment of the laptop run: right rewards, given to the wrong completions of the same batch.

    PYTHONPATH=tools hatch run apps/gsm8k:train --set 'reward.functions=[shuffled_reward:shuffled]'

Nothing can be learned from them, so held-out accuracy must not rise.
"""

import random
from collections.abc import Sequence
from typing import Any

from grpo_gsm8k.grading import answer


def shuffled(*, completions: Sequence[str], answers: Sequence[str], step: int, **_: Any) -> list[float | None]:
    """The rewards of `answer`, in an order that depends on the step alone."""
    rewards = answer(completions=completions, answers=answers)
    random.Random(step).shuffle(rewards)
    return rewards
