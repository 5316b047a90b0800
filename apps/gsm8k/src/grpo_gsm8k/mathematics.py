r"""Answers beyond numbers, compared by math-verify (`pip install 'grpo-gsm8k[math]'`).

Set ``reward.functions=[grpo_gsm8k.mathematics:equal, format]``. It then runs in a process of its own, as a user's function
does: some expressions keep a computer algebra system busy for ever, and ``reward.timeout`` ends them.
"""

import logging
from collections.abc import Sequence
from typing import Any

from grpo_trainer.rewards.functions import RewardError

try:
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise RewardError(
        "the reward function grpo_gsm8k.mathematics:equal needs math-verify with its parser: "
        f"{error.name} is not installed. Run: pip install 'grpo-gsm8k[math]'"
    ) from error

__all__ = ["equal"]

# It warns that nobody limits its time. The worker does.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the answer means the same as the data set's, such as ``\sqrt{8}`` and ``2\sqrt{2}``; unscored where that has none.

    Args:
        completions: the answer is what follows the first ``####`` on its line, or else what math-verify finds.
        answers: the same, or the bare expression.
    """
    rewards: list[float | None] = []
    for completion, answer in zip(completions, answers):
        gold = _parse(answer if "####" in answer or "\\boxed" in answer else f"#### {answer}")
        rewards.append(float(verify(gold, _parse(completion), timeout_seconds=None)) if gold else None)
    return rewards


def _parse(text: str) -> list[Any]:
    _, mark, rest = text.partition("####")
    if mark:
        text = f"\\boxed{{{rest.strip().partition(chr(10))[0]}}}"
    return parse(text, parsing_timeout=None)
