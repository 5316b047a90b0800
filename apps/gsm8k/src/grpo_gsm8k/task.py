"""GSM8K as a task: problems, rewards, and when an answer is right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_gsm8k import grading
from grpo_trainer.task import Judgement, Problem, Split

if TYPE_CHECKING:
    from grpo_contracts import RewardFunction

__all__ = ["TASK"]

_EMBEDDED_SIZE: Mapping[Split, int] = {"train": 8_192, "test": 1_024}


class Gsm8k:
    """Grade-school word problems; the answer is the number after ``####``."""

    name = "gsm8k"
    title = "GRPO on grade-school mathematics."
    folder = Path(__file__).parent
    instruction = "Think step by step. Then write the answer on a line of its own, as #### followed by the number and nothing else."
    policies: Mapping[str, Path] = {"embedded": folder / "embedded" / "policy"}
    rewards: Mapping[str, "RewardFunction"] = {
        "answer": grading.answer,
        "flexible": grading.flexible,
        "format": grading.format,
    }
    # A well-formed wrong answer must stay worth far less than a right one.
    weights: Mapping[str, float] = {"answer": 1.0, "format": 0.1}

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """Read a split of GSM8K, of a data set in its format, or of the generated problems (``embedded``)."""
        if source != "embedded":
            from grpo_trainer.data.sources import read_problems

            return read_problems(source, split, limit=limit)
        from grpo_gsm8k.embedded.problems import generate

        return [
            Problem(problem.question, problem.answer, f"embedded {split}:{number}")
            for number, problem in enumerate(generate(split, limit or _EMBEDDED_SIZE[split]), 1)
        ]

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Strict: the number after ``####`` is the answer. Lenient: the last number is."""
        gold = grading.final_answer(problem.answer)
        strict, lenient = grading.final_answer(completion), grading.last_number(completion)
        read = f"#### {strict}" if strict is not None else "" if lenient is None else f"last number {lenient}"
        return Judgement(
            strict=gold is not None and strict == gold,
            lenient=gold is not None and lenient == gold,
            formed=grading.is_formed(completion, finished=finished),
            read=read,
        )


TASK = Gsm8k()
