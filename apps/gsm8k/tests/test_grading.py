"""Reading answers: numbers as people write them, GSM8K's own rule on its own text, and no text that takes long."""

import json
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_gsm8k import grading
from grpo_gsm8k.task import TASK
from grpo_trainer.data.sources import DataError
from grpo_trainer.rewards.functions import RewardError, load_function
from grpo_trainer.task import Problem

GSM8K = next((up / "shared/data/gsm8k" for up in Path(__file__).parents if (up / "shared/data/gsm8k").is_dir()), None)

# A number after the mark, and its value; None: neither it nor a part of it is to be read.
FINAL = [
    ("18", "18"),
    ("0", "0"),
    ("007", "7"),
    ("1080", "1080"),
    ("-5", "-5"),
    ("+7", "7"),
    ("−7", "-7"),
    ("− 7", "-7"),
    ("–7", "-7"),
    (".5", "1/2"),
    ("-.5", "-1/2"),
    ("0.5", "1/2"),
    ("18.00", "18"),
    ("18.", "18"),
    ("18...", "18"),
    ("1,080", "1080"),
    ("1,234,567.80", "12345678/10"),
    ("1,00,000", "100000"),
    ("12,34,567", "1234567"),
    ("1 080", "1080"),
    ("1\u00a0080", "1080"),
    ("1\u2009080", "1080"),
    ("1\u202f080\u202f000", "1080000"),
    ("1'080", "1080"),
    ("1’080.5", "10805/10"),
    ("1.080,50", "10805/10"),
    ("1.080.500", "1080500"),
    ("1 080,50", "10805/10"),
    ("1.080", "108/100"),
    ("1{,}080", "1080"),
    (r"1\,080", "1080"),
    ("$3.50", "7/2"),
    ("$ 5", "5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("−$5", "-5"),
    ("US$5", "5"),
    (r"\$5", "5"),
    ("€9", "9"),
    ("9 €", "9"),
    ("9€", "9"),
    ("£9", "9"),
    ("₹1,00,000", "100000"),
    ("Rs. 500", "500"),
    ("USD 5", "5"),
    ("5 USD", "5"),
    ("5¢", "5"),
    ("20%", "20"),
    ("20 %", "20"),
    (r"20\%", "20"),
    ("20 percent", "20"),
    ("12 apples", "12"),
    ("12apples", "12"),
    ("60 km/h", "60"),
    ("60 m^2", "60"),
    ("60 m²", "60"),
    ("90°", "90"),
    (r"90^\circ", "90"),
    (r"18\text{ dollars}", "18"),
    (r"\text{18}", "18"),
    (r"$18$", "18"),
    (r"\(18\)", "18"),
    ("1/2", "1/2"),
    ("1 / 2", "1/2"),
    ("-1/2", "-1/2"),
    ("1⁄2", "1/2"),
    ("4/2", "2"),
    ("$1/2", "1/2"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\dfrac{1}{2}", "-1/2"),
    (r"\frac12", "1/2"),
    (r"\frac{1{,}080}{2}", "540"),
    ("½", "1/2"),
    ("2½", "5/2"),
    ("2 2/3", "8/3"),
    ("-2 2/3", "-8/3"),
    ("2 and 1/2", "5/2"),
    (r"2\frac{2}{3}", "8/3"),
    (r"2 \frac{2}{3} cups", "8/3"),
    ("1,080 1/2", "2161/2"),
    ("1 180/360", "3/2"),
    ("1e3", "1000"),
    ("1.08e3", "1080"),
    ("1.08E+3", "1080"),
    ("5e-1", "1/2"),
    ("1.08 × 10^3", "1080"),
    ("1.08 x 10^3", "1080"),
    ("1.08*10**3", "1080"),
    (r"1.08 \times 10^{3}", "1080"),
    ("5 · 10⁻¹", "1/2"),
    ("10^6", "1000000"),
    ("10⁶", "1000000"),
    ("5 million", "5000000"),
    ("2.5 thousand dollars", "2500"),
    ("3 hundred thousand", "300000"),
    ("$10k", "10000"),
    # Parts of numbers, lists and ranges.
    ("3:30", None),
    ("3:30 pm", None),
    ("1.5.2", None),
    ("1,5", None),
    ("1,08", None),
    ("0,123", None),
    ("1,080,50", None),
    ("10,80,500,1", None),
    ("3, 4", None),
    ("2-3", None),
    ("2 – 3", None),
    ("2-1/2", None),
    ("1/0", None),
    ("1/2/2020", None),
    ("2 3/2", None),
    ("2^10", None),
    ("2^x", None),
    ("2x", None),
    ("5x3", None),
    ("0x1F", None),
    ("2h30", None),
    ("2 hours 30", None),
    ("2 hours 30 minutes", None),
    ("2 hours, 30 minutes", None),
    ("2 hours and 30 minutes", None),
    ("5 feet 3 inches", None),
    ("5'11\"", None),
    ("3 dollars and 50 cents", None),
    ("5M", None),
    ("5€50", None),
    ("0.333...", None),
    (r"0.\overline{3}", None),
    (r"2\sqrt{3}", None),
    ("2π", None),
    ("3 + 15", None),
    ("3 + 15 = 18", None),
    ("1e1000", None),
    ("9" * 5_000, None),
    ("1" + ",000" * 2_000, None),
    ("1e" + "9" * 5_000, None),
]
# A text without such a mark, what is read leniently, and where.
LENIENT = [
    ("", None, ""),
    ("none", None, ""),
    ("####", None, ""),
    ("#### none", None, ""),
    ("#### -", None, ""),
    ("#### $", None, ""),
    ("### 18", "18", "last number"),
    ("#### **18**", "18", "last number"),
    ("#### - 5 apples", "5", "last number"),
    (r"#### \boxed{18}", "18", "boxed"),
    (r"\boxed{72}", "72", "boxed"),
    (r"It is 5. \boxed{72} clips in 3 days", "72", "boxed"),
    (r"\boxed{5}, no: \boxed{72}", "72", "boxed"),
    (r"\boxed{{72}}", "72", "boxed"),
    (r"\boxed{\text{72 clips}}", "72", "boxed"),
    (r"\boxed{\$1{,}080}", "1080", "boxed"),
    (r"\boxed{\frac{1}{2}}", "1/2", "boxed"),
    (r"\boxed{\mathbf{\dfrac{1}{2}}}", "1/2", "boxed"),
    (r"\boxed{- 5}", "-5", "boxed"),
    (r"\boxed{x = 5}", "5", "boxed"),
    (r"\boxed{x = - 5}", "-5", "boxed"),
    (r"\boxed{3 + 15 = 18}", "18", "boxed"),
    (r"\boxed{18\text{ m}^2}", "18", "boxed"),
    (r"**\boxed{18}**", "18", "boxed"),
    (r"\boxed{**18**}", "18", "boxed"),
    (r"It is 5. \boxed{3:30}", "'3:30'", "boxed"),
    (r"\boxed{x + 1}", "'x+1'", "boxed"),
    (r"\boxed{2x+1}", "'2x+1'", "boxed"),
    (r"\boxed{f(3)}", "'f(3)'", "boxed"),
    (r"\boxed{(3, 4)}", "'(3,4)'", "boxed"),
    (r"\boxed{\dfrac{\pi}{2}}", r"'\frac{\pi}{2}'", "boxed"),
    (r"\boxed{\pm 5}", r"'\pm5'", "boxed"),
    (r"\boxed{5!}", "'5!'", "boxed"),
    (r"\boxed{Yes}", "'Yes'", "boxed"),
    (r"5 \boxed{}", None, ""),
    (r"It is 7. \boxed{5", "5", "last number"),
    ("<answer>72</answer>", "72", "<answer>"),
    ("<answer> 72 dollars </answer> for 3 days", "72", "<answer>"),
    ("<answer>5</answer><answer>\n$72\n</answer>", "72", "<answer>"),
    ("<answer>72", "72", "<answer>"),
    ("5 <answer>between 3 and 4</answer>", None, ""),
    (r"<answer>\boxed{72}</answer>", "72", "boxed"),
    ("The answer is 72, in 3 days.", "72", "answer is"),
    ("The answer is 5. No, the answer is 72. In 3 days.", "72", "answer is"),
    ("So the answer is **$1,080** for 3 days", "1080", "answer is"),
    ("**The final answer is:** 72 in 3 days", "72", "answer is"),
    ("**Answer**: 72\n\n3 days", "72", "answer is"),
    ("Answer:\n72 in 3 days", "72", "answer is"),
    ("ANSWER: -5 in 3 days", "-5", "answer is"),
    (r"The answer is \(\frac{1}{2}\) of 3", "1/2", "answer is"),
    (r"The answer is $72$ in 3 days", "72", "answer is"),
    ("The answer is about 72 in 3 days", "72", "answer is"),
    ("The answer is 3 + 15 = 18", "18", "last number"),
    ("The answer is not 5 but 72", "72", "last number"),
    ("Answer:\n- 18 eggs", "18", "last number"),
    ("Total cost - $18", "18", "last number"),
    ("Final answer - 18", "18", "last number"),
    ("Final answer – 18", "18", "last number"),
    ("Result:\n\n- **18**", "18", "last number"),
    ("Price:\n-  18", "18", "last number"),
    ("it takes 2-3", "3", "last number"),
    ("from 10-20", "20", "last number"),
    ("20 - 2", "2", "last number"),
    ("20 − 2", "2", "last number"),
    ("= -18", "-18", "last number"),
    ("= - 18", "-18", "last number"),
    ("it is -18", "-18", "last number"),
    ("the change is −18", "-18", "last number"),
    ("48 + 24 = 72 clips!", "72", "last number"),
    ("<<48+24=72>>72 clips", "72", "last number"),
    ("18 apples in the bag H2O, x_1 and y^2", "18", "last number"),
    ("No.5", "5", "last number"),
    ("18 eggs by 3:30", None, ""),
    ("She runs 2 hours and 30 minutes.", None, ""),
    (r"18 or \sqrt{2}", None, ""),
    ("In 2 hours 30 people came", "30", "last number"),
    ("1 and 2 make 3 ½", "7/2", "last number"),
]


def value(written: str | None) -> Fraction | str | None:
    return None if written is None else written.strip("'") if written.startswith("'") else Fraction(written)


@pytest.mark.parametrize(("written", "expected"), FINAL, ids=[written[:30] for written, _ in FINAL])
def test_a_number_after_the_mark(written: str, expected: str | None) -> None:
    read = grading.read_final(f"So 1 and 2 are it.\n#### {written}")
    assert (read and read.value) == value(expected)
    assert grading.read_answer(f"So 1 and 2 are it.\n#### {written}") == read
    if read:
        assert read.place == "####"
        assert grading.read_answer(f"1 and 2 make {written}") == (read.value, "last number", read.written)


@pytest.mark.parametrize(("text", "expected", "place"), LENIENT, ids=[text[:30] for text, *_ in LENIENT])
def test_an_answer_without_the_mark(text: str, expected: str | None, place: str) -> None:
    assert grading.read_final(text) is None
    read = grading.read_answer(text)
    assert (read and read.value) == value(expected)
    assert (read.place if read else "") == place


def test_the_first_mark_with_a_number_counts() -> None:
    assert grading.read_final("#### 3\n#### 4") == (3, "####", "3")
    assert grading.read_final("#### Sum\n####4") == (4, "####", "4")
    assert grading.read_final("#### 3:30\n#### 4") is None
    assert grading.read_final("#### 12 apples and 3 pears") == (12, "####", "12")


def spellings(number: Fraction) -> list[str]:
    """Ways to write a number, by Python's own formatting."""
    over, under = abs(number.numerator), number.denominator
    sign = "-" if number < 0 else ""
    written = [
        f"{over}/{under}",
        f"{over} / {under}",
        rf"\frac{{{over}}}{{{under}}}",
        rf"\dfrac{{{over:,}}}{{{under}}}",
    ]
    whole, rest = divmod(over, under)
    if whole and rest:
        written += [f"{whole} {rest}/{under}", rf"{whole}\frac{{{rest}}}{{{under}}}", f"{whole:,} {rest}/{under}"]
    decimal = Decimal(over) / Decimal(under)
    if Fraction(decimal) == abs(number):
        plain = f"{decimal:,f}"
        point, digits = ("." in plain), plain.partition(".")
        written += [
            plain,
            plain.replace(",", "'"),
            plain.replace(",", ""),
            f"{decimal:e}",
            f"{decimal:f}00" if point else plain,
        ]
        written += [plain.replace(",", space) for space in (" ", "\u00a0", "\u2009", "\u202f", "{,}", r"\,")]
        written += [f"{decimal.scaleb(-3):f} × 10^3", rf"{decimal.scaleb(3):f} \times 10^{{-3}}"]
        if point and "," in digits[0]:
            written.append(f"{digits[0].replace(',', '.')},{digits[2]}")
        written += [f"${plain}", f"€ {plain}", f"USD {plain}"]
    return [sign + each for each in written] + [sign.replace("-", "−") + each for each in written]


@settings(deadline=None)
@given(st.fractions(max_denominator=2_000) | st.decimals(-(10**9), 10**9, places=3).map(Fraction))
def test_every_spelling_reads_back(number: Fraction) -> None:
    for written in spellings(number):
        for text, read in [
            (f"#### {written}", grading.read_final),
            (f"#### {written} apples.", grading.read_final),
            (rf"so $\boxed{{{written}}}$ it is", grading.read_boxed),
            (f"**The answer is: {written}**", grading.read_answer),
        ]:
            found = read(text)
            assert found is not None, text
            assert found.value == number, text
        assert grading.read_gold(written) == number, written


@settings(deadline=None)
@given(text=st.text() | st.text("0123456789.,'/ -−:^{}$\\#x=e½²h").map(lambda text: f"#### {text}"))
def test_no_text_breaks_the_rewards(text: str) -> None:
    for reward in TASK.rewards.values():
        assert reward(prompts=["q"], completions=[text], answers=["#### 3"]) in ([0.0], [1.0])
        assert reward(prompts=["q"], completions=["#### 3"], answers=[text]) in ([0.0], [1.0], [None])


HOSTILE = [
    *(
        "1",
        "1,",
        "1,000,",
        ",000",
        "1 ",
        "1 000",
        "1 000 ",
        "1'",
        "1.",
        ".5",
        "1/",
        "1/2 ",
        "2 1/",
        "1-",
        "-",
        "- ",
        "--1",
        "#",
    ),
    *(
        "####",
        "#### ",
        "####-",
        "####1",
        "#### 1,",
        " ",
        "\n",
        "\u202f",
        "$",
        "US$",
        "A",
        "a",
        "a1",
        "a ",
        "1a",
        "1e",
        "1e9",
    ),
    *(
        "{",
        "}",
        "{}",
        "{,}",
        "\\",
        "\\boxed{",
        "\\boxed{}",
        "\\boxed{1",
        "\\frac{",
        "\\frac{1}{",
        "\\frac{ ",
        "\\text{",
    ),
    *(
        "\\text{\\",
        "\\sqrt[",
        "\\sqrt{",
        "\\sqrt{1}",
        "<answer>",
        "<answer>1",
        "answer is ",
        "answer is 1",
        "Answer:",
        "answer: ",
    ),
    *(
        "1 hour ",
        "1 hour 1",
        "1 hours and ",
        "1 million ",
        " million",
        "½",
        "1½",
        "²",
        "1²",
        "10^",
        "×10^1",
        "1×10",
        "*",
        "**1",
    ),
    *("1^{", "^{1}", "_1", "=", "= -", "(- ", "π", "√", "…", "1:", "1 and ", "Rs.", "é", "١", "1_"),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_of_100_000_characters(piece: str) -> None:
    """A pattern that is tried again from every character would take minutes here."""
    text = piece * (100_000 // len(piece))
    for hostile in (text, f"#### 1{text}", f"answer: \\boxed{{1 {text}}}"):
        judgement = TASK.judge(hostile, Problem("q", hostile[:1_000], "x:1"), finished=True)
        assert len(judgement.read) <= 120


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("72", "72"),
        (" 72\n", "72"),
        ("$1,080.50", "2161/2"),
        ("1/2", "1/2"),
        ("-5", "-5"),
        ("72 clips", "72"),
        ("1 + 1 = 2\n#### 72", "72"),
        (r"So it is $\boxed{72}$ of 100.", "72"),
        (r"So it is $\boxed{\frac{\pi}{2}}$.", r"'\frac{\pi}{2}'"),
        ("The answer is 72", "72"),
        ("?", None),
        ("about 3 or 4", None),
        ("48 + 24 = 72", None),
        ("x = 72", None),
        ("#### 3:30", None),
        ("#### 2 hours 45", None),
        ("#### - 5", None),
        ("#### none, or 5", None),
    ],
)
def test_the_answer_of_a_data_set(answer: str, gold: str | None) -> None:
    assert grading.read_gold(answer) == value(gold)


def test_a_part_of_a_number_is_never_paid() -> None:
    for completion, gold in [("1/3", "1/2"), ("1/2", "1"), ("2 2/3", "2"), ("1e3", "1"), ("10^6", "10"), ("3:30", "3")]:
        for reward in (grading.answer, grading.flexible):
            assert reward(completions=[f"#### {completion}"], answers=[f"#### {gold}"]) == [0.0]
            assert reward(completions=[f"#### {completion}"], answers=[gold]) == [0.0]


def test_rewards() -> None:
    completions = ["a\n#### 1,080", "it is 1080", r"\boxed{1080}", "#### 5\n1080", "no"]
    given_ = {"completions": completions, "answers": ["<<90*12=1080>>1080\n#### 1,080"] * 5}
    assert grading.answer(**given_) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert grading.flexible(**given_) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert grading.boxed(**given_) == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert TASK.weights == {"answer": 1.0, "format": 0.1}
    for reward in (grading.answer, grading.boxed, grading.flexible):
        assert reward(completions=["#### 1"], answers=["?"]) == [None]


def test_what_is_shown_of_a_judgement() -> None:
    def judge(completion: str, answer: str = "#### 72") -> tuple[bool, bool, bool, str]:
        judgement = TASK.judge(completion, Problem("q", answer, "x:1"), finished=True)
        return judgement.strict, judgement.lenient, judgement.formed, judgement.read

    assert judge("so\n#### 72") == (True, True, True, "#### 72")
    assert judge("so\n#### $72.00 in all") == (True, True, False, "#### $72.00")
    assert judge(r"so \boxed{72}") == (False, True, False, "boxed 72")
    assert judge("The answer is 71") == (False, False, False, "answer is 71")
    assert judge("nothing") == (False, False, False, "")
    assert judge("nothing", "?") == (False, False, False, "")
    assert judge(r"\boxed{ x + 1 }", r"\boxed{x+1}") == (True, True, False, "boxed x + 1")
    assert judge("#### 1", r"\boxed{x+1}") == (False, False, True, "#### 1")


@pytest.mark.parametrize(
    ("text", "finished", "score"),
    [
        ("a\n#### 5", True, 1.0),
        ("#### 5", True, 1.0),
        ("a\n#### $1,000.50", True, 1.0),
        ("a\n#### 1/2", True, 1.0),
        ("a\n#### 5\n", True, 1.0),
        ("a\n#### 5", False, 0.0),
        ("a #### 5", True, 0.0),
        ("a\n#### 5 apples", True, 0.0),
        ("a\n#### 3:30", True, 0.0),
        ("#### 5\nmore", True, 0.0),
        ("#### 4\n#### 5", True, 0.0),
        ("a\n####", True, 0.0),
        ("a", True, 0.0),
    ],
)
def test_format(text: str, finished: bool, score: float) -> None:
    assert grading.format(completions=[text], finished=[finished]) == [score]


def test_answers_that_cannot_be_read_are_an_error_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"

    def write(*answers: str) -> None:
        rows = [{"question": f"Question {number}?", "answer": answer} for number, answer in enumerate(answers)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("72", r"\boxed{5}", "so\n#### 1,080")
    assert len(TASK.problems(str(tmp_path), "train", 0)) == 3
    write(*["72"] * 1_500, "so it goes", "3 or 4", *["72"] * 500)
    with pytest.raises(
        DataError, match=rf"2 of 2,002 answers \(0\.1 %\) hold no number: the first is {file}:1501: 'so it goes'"
    ):
        TASK.problems(str(tmp_path), "train", 0)
    assert len(TASK.problems(str(tmp_path), "train", 1_500)) == 1_500


@pytest.mark.skipif(GSM8K is None, reason="needs GSM8K in shared/data/gsm8k of this folder or one above it")
def test_on_gsm8k_itself() -> None:
    """OpenAI's `extract_answer`, as they published it, is the oracle."""
    assert GSM8K is not None
    extract = re.compile(r"#### (\-?[0-9\.\,]+)")
    golds = [problem.answer for split in ("train", "test") for problem in TASK.problems(str(GSM8K), split, 0)]
    assert len(golds) == 8_792
    for gold in golds:
        match = extract.search(gold)
        assert match is not None
        published = Fraction(match[1].strip().replace(",", ""))
        readings = grading.read_final(gold), grading.read_answer(gold), grading.read_last_number(gold)
        assert [reading and reading.value for reading in readings] == [published] * 3
        assert grading.read_gold(gold) == published
        assert grading.read_gold(match[1]) == published
    for reward in (grading.answer, grading.flexible, grading.format):
        assert set(reward(completions=golds, answers=golds)) == {1.0}


def test_mathematics_beyond_numbers() -> None:
    pytest.importorskip("math_verify", reason="needs the extra grpo-gsm8k[math]")
    equal = load_function("grpo_gsm8k.mathematics:equal")
    for completion, answer, score in [
        (r"so \boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}", 1.0),
        (r"so \boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"so \boxed{3\sqrt{2}}", r"\sqrt{8}", 0.0),
        ("so\n#### 1 + x\n", "#### x + 1", 1.0),
        (r"The answer is $\frac{\pi}{2}$.", r"\frac{\pi}{2}", 1.0),
        (r"\boxed{(3, 4)}", "(3,4)", 1.0),
        ("#### 1,080", "1080", 1.0),
        ("#### 72", "worked\n#### 72", 1.0),
        ("#### 71", "worked\n#### 72", 0.0),
        ("", "72", 0.0),
    ]:
        assert equal(prompts=[""], completions=[completion], answers=[answer]) == [score], (completion, answer)


def test_without_math_verify_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "grpo_gsm8k.mathematics", raising=False)
    with pytest.raises(
        RewardError, match=r"needs math_verify, which is not installed. Run: pip install 'grpo-gsm8k\[math\]'"
    ):
        load_function("grpo_gsm8k.mathematics:equal")
