"""GSM8K as a task: problems, rewards, and when an answer is right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_gsm8k import grading
from grpo_trainer.task import Judgement, Problem, Split

if TYPE_CHECKING:
    from grpo_contracts import RewardFunction

__all__ = ["TASK"]


class Gsm8k:
    """Grade-school word problems; the answer is the number after ``####``."""

    name = "gsm8k"
    title = "GRPO on grade-school mathematics."
    folder = Path(__file__).parent
    instruction = "Think step by step. Then give the answer on a line of its own: #### and the number, nothing else."
    policies: Mapping[str, Path] = {"embedded": folder / "embedded" / "policy"}
    rewards: Mapping[str, "RewardFunction"] = {
        "answer": grading.answer,
        "boxed": grading.boxed,
        "flexible": grading.flexible,
        "format": grading.format,
    }
    # A well-formed wrong answer must stay worth far less than a right one.
    weights: Mapping[str, float] = {"answer": 1.0, "format": 0.1}

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """Read a split of GSM8K, of a data set in its format, or of generated problems (``embedded[-easy]``)."""
        if source not in ("embedded", "embedded-easy"):
            from grpo_trainer.data.sources import read_problems

            problems = read_problems(source, split, limit=limit)
            _check_answers(problems)
            return problems
        from grpo_gsm8k.embedded.problems import embedded

        made = embedded(source, split, limit)
        return [Problem(each.question, each.answer, f"{source} {split}:{n}") for n, each in enumerate(made, 1)]

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Strict: right after ``####``, or in the last box if the answer is no number. Lenient: however it is put."""
        gold = grading.read_gold(problem.answer)
        lenient = grading.read_answer(completion)
        strict = grading.read_boxed(completion) if isinstance(gold, str) else grading.read_final(completion)
        return Judgement(
            strict=gold is not None and strict is not None and strict.value == gold,
            lenient=gold is not None and lenient is not None and lenient.value == gold,
            formed=grading.is_formed(completion, finished=finished),
            read="" if lenient is None else f"{lenient.place} {lenient.written[:100]}",
            answer="" if lenient is None else str(lenient.value)[:100],
        )


def _check_answers(problems: Sequence[Problem]) -> None:
    from grpo_trainer.data.sources import DataError

    if unread := [problem for problem in problems if grading.read_gold(problem.answer) is None]:
        share = max(0.1, 100 * len(unread) / len(problems))
        raise DataError(
            f"{len(unread):,} of {len(problems):,} answers ({share:.1f} %) hold no number: the first is "
            f"{unread[0].place}: {unread[0].answer[-120:]!r}. An answer must end in #### 72, hold \\boxed{{72}}, or be "
            "the bare number. Correct these problems or remove them"
        )


TASK = Gsm8k()
"""GSM8K as a task of grpo-trainer."""
