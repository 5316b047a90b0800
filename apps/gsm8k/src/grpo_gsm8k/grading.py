r"""GSM8K's rewards: the final answer, the answer wherever it stands, the form."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from grpo_gsm8k.numerals import CONTINUED, NUMBER, TOKEN, normalize, value_of

_NUMBER = re.compile(NUMBER, re.VERBOSE)
_FINAL = re.compile(rf"\#\#\#\#\s*+{NUMBER}", re.VERBOSE)
_ANNOUNCED = re.compile(r"(?i:\banswers?\b[ ]?(?:is|was|equals|:|=)[\s:=]{0,8}(?:(?:about|approximately|exactly)[ ])?)")
_CALCULATED = re.compile(r"[-+*/^×÷<>±\\]|\w\(")  # before a number
_GOES_ON = re.compile(r"[ ]?[-+*×÷^!\\]")  # after it
_Place = Literal["####", "boxed", "<answer>", "answer is", "last number"]


class Reading(NamedTuple):
    """An answer that was read, and how; the value of a box may also be text, such as ``x+1``, without spaces."""

    value: Fraction | str
    place: _Place
    written: str


def read_final(text: str) -> Reading | None:
    """Read the number after ``####``: the first such mark that a number follows counts.

    Source: openai/grade-school-math, ``dataset.py``. Unlike there, of a range, a list or a part of a number it is None.
    """
    match = _FINAL.search(normalize(text))
    return _read_alone(match, "####") if match else None


def read_boxed(text: str) -> Reading | None:
    r"""Read what the last ``\boxed{}`` holds; None without one that is closed."""
    text = normalize(text).replace("**", "")
    span = _last_box(text)
    return _read_inside(text, *span, "boxed") if span else None


def read_answer(text: str) -> Reading | None:
    r"""Read an answer however it is put.

    The first of these that the text has decides, even if it holds no number: ``#### n``; the last ``\boxed{}``; the
    last ``<answer>``. Then the last "the answer is n" or "answer: n" with a number, then the last number.
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
    numbers = _find(normalize(text).replace("**", ""))
    return _read(numbers[-1], "last number") if numbers else None


def read_gold(text: str) -> Fraction | str | None:
    """Read the data set's own answer as `read_answer` does, but a number without a mark must be the only one."""
    reading = read_answer(text)
    if reading and reading.place == "last number" and (re.search("=|####", text) or len(_find(normalize(text))) > 1):
        return None
    return reading and reading.value


def answer(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the number after ``####`` is the answer, else 0; unscored where the data set's own cannot be read."""
    return [_score(read_final(completion), gold) for completion, gold in zip(completions, answers)]


def boxed(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the last ``\boxed{}`` holds the answer."""
    return [_score(read_boxed(completion), gold) for completion, gold in zip(completions, answers)]


def flexible(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the answer is right however it is put: skill without the form, to be reported beside `answer`."""
    return [_score(read_answer(completion), gold) for completion, gold in zip(completions, answers)]


def format(*, completions: Sequence[str], finished: Sequence[bool] | None = None, **_: Any) -> list[float | None]:  # noqa: A001
    """1 where `is_formed`."""
    ended = [True] * len(completions) if finished is None else finished
    return [float(is_formed(text, finished=done)) for text, done in zip(completions, ended)]


def is_formed(completion: str, *, finished: bool) -> bool:
    """Whether one ``####`` stands, with a number, alone on the last line, and the completion ended by itself."""
    line = completion.rstrip().rpartition("\n")[2]
    if not finished or completion.count("####") != 1 or not line.startswith("####"):
        return False
    return (match := _NUMBER.fullmatch(normalize(line[4:]).strip())) is not None and value_of(match) is not None


def _score(reading: Reading | None, answer: str) -> float | None:
    gold = read_gold(answer)
    return None if gold is None else float(reading is not None and reading.value == gold)


def _find(text: str, start: int = 0, end: int = 1 << 60) -> list[re.Match[str]]:
    return [match for match in TOKEN.finditer(text, start, end) if match["number"] or match["opaque"]]


def _read(match: re.Match[str], place: _Place) -> Reading | None:
    value = value_of(match) if match["number"] else None
    return None if value is None else Reading(value, place, match[0].lstrip("#").strip().rstrip(".…"))


def _read_alone(match: re.Match[str], place: _Place) -> Reading | None:
    return None if CONTINUED.match(match.string, match.end()) else _read(match, place)


def _last_box(text: str) -> tuple[int, int] | None:
    before, box, inside = text.rpartition("\\boxed{")
    depth, start = 1, len(before) + len(box)
    for brace in re.finditer(r"[{}]", inside if box else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start, start + brace.start()
    return None


def _read_inside(text: str, start: int, end: int, place: _Place) -> Reading | None:
    """Read the one number of a box or a tag, after the last `=` if there is one."""
    begin = max(text.rfind("=", start, end) + 1, start)
    numbers = _find(text, begin, end)
    if len(numbers) == 1 and (reading := _read(numbers[0], place)):
        before, after = numbers[0].span()
        if not _CALCULATED.search(text, begin, before) and not _GOES_ON.match(text, after, end):
            return reading
    written = re.sub(r"[\s$]|(?<=\\)[dt](?=frac)", "", text[start:end])
    return Reading(written, place, text[start:end].strip()) if written and place == "boxed" else None
