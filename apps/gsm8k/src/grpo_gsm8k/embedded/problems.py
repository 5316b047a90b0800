"""Word problems in GSM8K's format, made from templates; train and test share neither texts nor number combinations."""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from grpo_gsm8k.embedded.templates import ITEMS, NAMES, TEMPLATES, Template
from grpo_trainer.settings.paths import argument_path, writing_to
from grpo_trainer.task import Split, Task

TEST_SHARE = 8  # one number combination in eight belongs to the test split
SALT = 27  # of the hash that splits; chosen so that each template has its share of both splits
_SIZE: Mapping[Split, int] = {"train": 8_192, "test": 1_024}  # by default
# Problems of a split; of more than these, most draws would repeat a question.
MOST: Mapping[Split, int] = {"train": 100_000, "test": 10_000}
MOST_EASY: Mapping[Split, int] = {"train": 20_000, "test": 2_000}
LARGEST = 99  # results stay within what a small model can learn to calculate
_CALCULATION = re.compile(r"\[(\w+)([-+*/])(\w+)\]")


@dataclass(frozen=True)
class WordProblem:
    """A word problem with its worked solution.

    Args:
        question: the text posed.
        answer: worked steps with GSM8K's calculator annotations, then ``#### n``.
        mistaken: a worked solution by the template's common mistake, its answer wrong; None where it does not apply.
        template: name of the template.
        numbers: the numbers the question gives, in its order.
    """

    question: str
    answer: str
    mistaken: str | None
    template: Template
    numbers: tuple[int, ...]


def embedded(source: str, split: Split, limit: int) -> list[WordProblem]:
    """The problems of ``embedded`` or ``embedded-easy``; a limit of 0 means as many as a run uses by default."""
    from grpo_trainer.data.sources import check_limit

    make, most = (generate, MOST) if source == "embedded" else (generate_easy, MOST_EASY)
    check_limit(source, split, limit, most[split])
    return make(split, limit or _SIZE[split])


def generate(split: Split, count: int, *, seed: int = 0) -> list[WordProblem]:
    """Make distinct problems; fewer of them is a prefix of more.

    Args:
        split: ``train`` or ``test``: which number combinations may be used.
        count: how many problems, at most ``MOST[split]``.
        seed: another seed gives other problems of the same split.

    Returns:
        ``count`` problems with different questions.
    """
    return list(islice(stream(split, seed=seed), count))


def generate_easy(split: Split, count: int, *, seed: int = 0) -> list[WordProblem]:
    """The same, at most ``MOST_EASY[split]``, of one step, solved without words: ``9 - 3 = 6``, ``#### 6``."""
    easy = (problem for problem in stream(split, seed=seed) if len(problem.template.steps) == 1)
    return [replace(problem, answer=_calculation(problem.answer)) for problem in islice(easy, count)]


def _calculation(answer: str) -> str:
    [(a, operator, b, c)] = re.findall(r"<<(\w+)([-+*/])(\w+)=(\w+)>>", answer)
    return f"{a} {operator} {b} = {c}\n#### {c}"


def stream(split: Split, *, seed: int = 0) -> Iterator[WordProblem]:
    """Make distinct problems without end: see :func:`generate`."""
    rng = random.Random(f"grpo-gsm8k/{split}/{seed}")
    seen: set[str] = set()
    while True:
        problem = _draw(rng)
        if problem is None or split_of(problem.numbers) != split or problem.question in seen:
            continue
        seen.add(problem.question)
        yield problem


def split_of(numbers: tuple[int, ...]) -> Split:
    """Say which split a combination of numbers belongs to, whatever their order and whatever the template.

    Args:
        numbers: the numbers a question gives.

    Returns:
        ``train`` or ``test``.
    """
    key = f"{SALT}:{sorted(numbers)}"
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def write_jsonl(path: Path, problems: list[WordProblem]) -> None:
    """Write problems as GSM8K writes its own: one JSON object a line with the fields ``question`` and ``answer``.

    Args:
        path: the file, replaced if it exists; its folder is made.
        problems: what to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps({"question": problem.question, "answer": problem.answer}) + "\n")


def write_splits(folder: Path, *, train: int = 20_000, test: int = 1_000, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl``, the layout that ``data.source=FOLDER`` reads.

    Args:
        folder: where to.
        train: number of training problems.
        test: number of test problems.
        seed: of the generator.

    Returns:
        The two paths.
    """
    paths = folder / "train.jsonl", folder / "test.jsonl"
    write_jsonl(paths[0], generate("train", train, seed=seed))
    write_jsonl(paths[1], generate("test", test, seed=seed))
    return paths


def main(_: Task, arguments: Sequence[str]) -> int:
    """``make-data``: write ``train.jsonl`` and ``test.jsonl``."""
    parser = argparse.ArgumentParser(prog="grpo-gsm8k make-data", description=main.__doc__)
    parser.add_argument("folder", type=argument_path)
    parser.add_argument("--train", type=int, default=8_192, help="training problems (default: %(default)s)")
    parser.add_argument("--test", type=int, default=1_024, help="test problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for split, most in MOST.items():
        if not 0 <= (count := vars(given)[split]) <= most:
            parser.error(f"--{split} must be 0 to {most:,}: got {count:,}")
    with writing_to(given.folder):
        paths = write_splits(given.folder, train=given.train, test=given.test, seed=given.seed)
    for path in paths:
        print(path)
    return 0


def _draw(rng: random.Random) -> WordProblem | None:
    """Draw one problem, or None where the numbers drawn do not work out."""
    template = rng.choice(TEMPLATES)
    values = _numbers(template, rng)
    if values is None:
        return None
    first, second = rng.sample(NAMES, 2)
    item, other = rng.sample(ITEMS, 2)
    words = {"A": first, "B": second, "item": item, "other": other, **values}
    right = _work(template.steps, words)
    if right is None:
        return None
    wrong = _work(template.mistake, words)
    return WordProblem(
        question=template.question.format_map(words),
        answer=right[0],
        mistaken=wrong[0] if wrong is not None and wrong[1] != right[1] else None,
        template=template,
        numbers=tuple(values[name] for name in _given(template)),
    )


def _given(template: Template) -> list[str]:
    return [name for name in re.findall(r"\{(\w+)\}", template.question) if name in template.numbers]


def _numbers(template: Template, rng: random.Random) -> dict[str, int] | None:
    values: dict[str, int] = {}
    for name, source in template.numbers.items():
        if isinstance(source, str):
            left, right = (values.get(part) or int(part) for part in (source[0], source[2:]))
            value = _calculate(left, source[1], right)
            if value is None:
                return None
            values[name] = value
        else:
            values[name] = rng.randint(*source)
    return values


def _work(steps: tuple[str, ...], words: dict[str, str | int]) -> tuple[str, int] | None:
    """Write the steps out; None where one of them leaves the small positive integers."""
    known = dict(words)
    lines, value = [], 0
    for step, result in zip(steps, "xyz"):
        match = _CALCULATION.search(step)
        if match is None:
            raise ValueError(f"a step must hold one calculation such as [a*b]: got {step!r}")
        left, operator, right = (known.get(part, part) for part in match.groups())
        outcome = _calculate(int(left), str(operator), int(right))
        if outcome is None:
            return None
        value = known[result] = outcome
        written = f"<<{left}{operator}{right}={value}>>{value}"
        lines.append((step[: match.start()] + written + step[match.end() :]).format_map(words))
    return "\n".join([*lines, f"#### {value}"]), value


def _calculate(left: int, operator: str, right: int) -> int | None:
    if operator == "/":
        return left // right if left % right == 0 else None
    value = left + right if operator == "+" else left - right if operator == "-" else left * right
    return value if 0 < value <= LARGEST else None
