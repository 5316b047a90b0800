r"""GSM8K's rewards: the final answer, the answer wherever it stands, the form."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from grpo_gsm8k.numerals import CONTINUED, NUMBER, TOKEN, normalize, value_of

_NUMBER = re.compile(NUMBER, re.VERBOSE)
_FINAL = re.compile(rf"\#\#\#\#\s*+{NUMBER}", re.VERBOSE)
_ANNOUNCED = re.compile(r"(?i:\banswers?\b[ ]?(?:is|was|equals|:|=)[\s:=]{0,8}(?:(?:about|approximately|exactly)[ ])?)")
_CALCULATED = re.compile(r"[-+*/^×÷<>±\\]|\w\(")  # before a number
_GOES_ON = re.compile(r"[ ]?[-+*×÷^!\\]")  # after it


class Reading(NamedTuple):
    """An answer that was read.

    Args:
        value: a number; or what a box holds besides numbers, such as ``x+1``, without spaces.
        place: where it stands: ``####``, ``boxed``, ``<answer>``, ``answer is`` or ``last number``.
        written: as it is written there.
    """

    value: Fraction | str
    place: str
    written: str


def read_final(text: str) -> Reading | None:
    """Read the number after ``####``: GSM8K's rule, the first such mark that a number follows counts.

    Args:
        text: a completion, or the data set's ``answer`` field.

    Returns:
        The reading; None without such a mark, or where a range, a list or a part of a number follows it.

    Source: openai/grade-school-math, ``dataset.py``.
    """
    match = _FINAL.search(normalize(text))
    return _read_alone(match, "####") if match else None


def read_boxed(text: str) -> Reading | None:
    r"""Read what the last ``\boxed{}`` holds; None without one that is closed."""
    text = normalize(text).replace("**", "")
    span = _last_box(text)
    return _read_inside(text, *span, "boxed") if span else None


def read_answer(text: str) -> Reading | None:
    r"""Read an answer, however it is put.

    The first of these that the text has decides, even if it holds no number: ``#### n``; the last ``\boxed{}``; the last
    ``<answer>``. Then the last "the answer is n" or "answer: n" with a number, then the last number.

    Args:
        text: a completion.

    Returns:
        The reading, or None.
    """
    text = normalize(text)
    if match := _FINAL.search(text):
        return _read_alone(match, "####")
    text = text.replace("**", "")
    if span := _last_box(text):
        return _read_inside(text, *span, "boxed")
    if (opened := text.rfind("<answer>")) >= 0:
        closed = text.find("</answer>", opened)
        return _read_inside(text, opened + len("<answer>"), len(text) if closed < 0 else closed, "<answer>")
    numbers = [_NUMBER.match(text, found.end()) for found in _ANNOUNCED.finditer(text)]
    announced = [reading for match in numbers if match and (reading := _read_alone(match, "answer is"))]
    return announced[-1] if announced else read_last_number(text)


def read_last_number(text: str) -> Reading | None:
    """Read the last number of a text; None if there is none, or if the last one cannot be read whole."""
    tokens = _numbers(normalize(text).replace("**", ""))
    return _reading(tokens[-1], "last number") if tokens else None


def read_gold(text: str) -> Fraction | str | None:
    r"""Read the data set's own answer: as `read_answer` does, but a number that is not marked must be the only one.

    Args:
        text: the ``answer`` field, such as ``... #### 72``, ``\boxed{72}`` or ``72``.

    Returns:
        Its value; None where it cannot be told.
    """
    reading = read_answer(text)
    if reading is None or reading.place != "last number":
        return reading and reading.value
    is_only = len(_numbers(normalize(text))) == 1 and not re.search("=|####", text)
    return reading.value if is_only else None


def answer(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the number after ``####`` is the answer, else 0; unscored where the data set's own cannot be read."""
    return [_score(read_final(completion), gold) for completion, gold in zip(completions, answers)]


def boxed(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the last ``\boxed{}`` holds the answer."""
    return [_score(read_boxed(completion), gold) for completion, gold in zip(completions, answers)]


def flexible(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the answer is right however it is put: skill without the form, to be reported beside `answer`."""
    return [_score(read_answer(completion), gold) for completion, gold in zip(completions, answers)]


def format(  # noqa: A001 - the name people type in `reward.functions`
    *, completions: Sequence[str], finished: Sequence[bool] | None = None, **_: Any
) -> list[float | None]:
    """1 where `is_formed`."""
    ended = [True] * len(completions) if finished is None else finished
    return [float(is_formed(text, finished=done)) for text, done in zip(completions, ended)]


def is_formed(completion: str, *, finished: bool) -> bool:
    """Whether one ``####`` stands, with a number, alone on the last line, and the completion ended by itself."""
    line = completion.rstrip().rpartition("\n")[2]
    if not finished or completion.count("####") != 1 or not line.startswith("####"):
        return False
    match = _NUMBER.fullmatch(normalize(line[4:]).strip())
    return match is not None and value_of(match) is not None


def _score(reading: Reading | None, answer: str) -> float | None:
    gold = read_gold(answer)
    return None if gold is None else float(reading is not None and reading.value == gold)


def _numbers(text: str) -> list[re.Match[str]]:
    return [match for match in TOKEN.finditer(text) if match["number"] or match["opaque"]]


def _reading(match: re.Match[str], place: str) -> Reading | None:
    value = value_of(match) if match["number"] else None
    return None if value is None else Reading(value, place, match[0].lstrip("#").strip().rstrip(".…"))


def _read_alone(match: re.Match[str], place: str) -> Reading | None:
    return None if CONTINUED.match(match.string, match.end()) else _reading(match, place)


def _last_box(text: str) -> tuple[int, int] | None:
    opened = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1 if opened >= len("\\boxed{") else 0
    for brace in re.finditer(r"[{}]", text[opened:] if depth else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return opened, opened + brace.start()
    return None


def _read_inside(text: str, start: int, end: int, place: str) -> Reading | None:
    """Read the one number of a box or a tag, after the last `=` if there is one."""
    begin = max(text.rfind("=", start, end) + 1, start)
    tokens = [match for match in TOKEN.finditer(text, begin, end) if match["number"] or match["opaque"]]
    if len(tokens) == 1 and (reading := _reading(tokens[0], place)):
        before, after = tokens[0].span()
        if not _CALCULATED.search(text, begin, before) and not _GOES_ON.match(text, after, end):
            return reading
    written = re.sub(r"[\s$]|(?<=\\)[dt](?=frac)", "", text[start:end])
    return Reading(written, place, text[start:end].strip()) if written and place == "boxed" else None
