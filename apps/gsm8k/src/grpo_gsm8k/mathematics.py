r"""Answers beyond numbers, compared by math-verify (`pip install 'grpo-gsm8k[math]'`).

Set ``reward.functions=[grpo_gsm8k.mathematics:equal,format]``. It then runs in a process of its own, as a user's
function does: some expressions keep a computer algebra system busy forever, and ``reward.timeout`` ends them.
"""

import logging
from collections.abc import Sequence
from typing import Any

from grpo_trainer.rewards.functions import RewardError

try:
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    message = f"grpo_gsm8k.mathematics needs {error.name}, which is not installed. Run: pip install 'grpo-gsm8k[math]'"
    raise RewardError(message) from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody limits its time: the worker does


def equal(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the answer means the same as the data set's, as ``\sqrt{8}`` and ``2\sqrt{2}`` do; unscored without one.

    An answer is what follows the first ``####`` on its line, else what math-verify finds; the data set's may be bare.
    """
    golds = [_parse(gold if "####" in gold or "\\boxed" in gold else f"#### {gold}") for gold in answers]
    rows = zip(golds, map(_parse, completions))
    return [float(verify(gold, found, timeout_seconds=None)) if gold else None for gold, found in rows]


def _parse(text: str) -> list[Any]:
    _, mark, rest = text.partition("####")
    if mark:
        text = f"\\boxed{{{rest.strip().partition(chr(10))[0]}}}"
    return parse(text, parsing_timeout=0)  # no limit, and no signals
