"""report.html: self-contained, escaped, and there whatever a run did or did not get to."""

import math
import random
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from toy import load

from grpo_trainer.report.accuracy import Accuracy
from grpo_trainer.report.charts import Series, intervals, lines, number, stacked
from grpo_trainer.report.page import write_report
from grpo_trainer.run.folder import RunFolder

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\x1b[2J\u202e</pre> 3 < 4 & 5"


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    config = load([], [f"run.dir={tmp_path / 'a <b> run'}", "log.tensorboard=false", "optimizer.learning_rate=1e-3"])
    with RunFolder(config, {"python": "3.11"}) as folder:
        yield folder


def fill(folder: RunFolder, steps: int) -> None:
    noise = random.Random(0)
    folder.start(0)
    folder.log(0, {"eval/accuracy": 0.3})
    for step in range(1, steps + 1):
        metrics = {
            "reward": noise.random(),
            "reward/<b>mine</b>": noise.random(),
            "accuracy": noise.random(),
            "entropy": noise.random(),
            "grad_norm": math.nan if step == 2 else 1.0,
            "sampling_logp_difference/mean": 0.0 if step < 3 else 1e-7,
            "seconds/rollout": 9.0 if step == 1 else 1.0,
            "seconds/update": 1.0,
            "seconds/step": 2.0,
        }
        folder.log(step, metrics)
        sample = {"prompt": EVIL, "completion": EVIL, "reward": None, "rewards": {EVIL: None, "answer": 1.0}}
        folder.completions(step, [sample] * 4)


def page(folder: RunFolder) -> Page:
    return Page(write_report(folder.path).read_text(encoding="utf-8"))


def test_a_whole_run(folder):
    fill(folder, 30)
    accuracy = {"before": {"correct": 150, "total": 500}, "after": {"correct": 300, "total": 500}}
    folder.summary(steps=60, seconds=187, device="2 x cpu", accuracy=accuracy)
    shown = page(folder)
    for text in ("30.0 % → 60.0 %", "+30.0 points on 500", "do not overlap", "3:07", "2 x cpu", "0.001", "Versions"):
        assert text in shown.text
    for title in ("Accuracy", "Reward", "Entropy", "Gradient norm", "Sampler and trainer apart", "Time of a step"):
        assert title in shown.text
    assert "KL to the reference" not in shown.text
    assert "Early: step 1" in shown.text
    assert "Late: step 30" in shown.text


def test_the_page_needs_nothing_else_and_runs_nothing(folder):
    fill(folder, 3)
    shown = page(folder)
    assert not {"script", "img", "link", "iframe", "b>"} & set(shown.tags)
    assert not {"src", "href", "onerror", "onclick"} & {name for name, _ in shown.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes


def test_model_text_is_shown_and_harmless(folder):
    fill(folder, 3)
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script" not in text
    assert "<img" not in text
    shown = Page(text).text
    assert "<script>alert('x')</script>" in shown
    assert "\\x1b[2J\\u202e" in shown
    assert "3 < 4 & 5" in shown
    assert "unscored" in shown


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_runs_that_stopped_early(folder, steps):
    if steps:
        fill(folder, steps)
    shown = page(folder)
    assert "unfinished" in shown.text
    assert f"{steps} of 60" in shown.text


def test_chance_is_called_chance(folder):
    accuracy = {"before": {"correct": 15, "total": 50}, "after": {"correct": 17, "total": 50}}
    folder.summary(steps=60, seconds=1, device="cpu", accuracy=accuracy)
    assert "may be chance" in page(folder).text


SHAPES = {
    "one point": [(1.0, 0.5)],
    "flat": [(float(step), 0.0) for step in range(50)],
    "flat large": [(float(step), 1e9) for step in range(50)],
    "tiny": [(float(step), 1e-300 * step) for step in range(5)],
    "negative": [(float(step), -3.0 + step) for step in range(7)],
    "long": [(float(step), math.sin(step)) for step in range(5000)],
    "gap": [(1.0, 1.0), (1000.0, 2.0)],
}


@pytest.mark.parametrize("points", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dots", [False, True])
def test_any_curve_is_drawn_within_its_frame(points, log, dots):
    svg = ElementTree.fromstring(lines([Series("a & b", points, dots=dots)], form=number, log=log))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    assert len(list(svg.iter("circle"))) <= 400


def test_a_first_step_that_compiles_does_not_flatten_the_others():
    rollout = [(float(step), 100.0 if step == 1 else 1.0) for step in range(1, 30)]
    svg, beyond = stacked([Series("rollout", rollout), Series("update", [(x, 1.0) for x, _ in rollout])], form=number)
    assert beyond == 1
    heights = [float(rect.attrib["height"]) for rect in ElementTree.fromstring(svg).iter("rect")]
    assert min(heights) > 20


def test_intervals_are_drawn():
    svg = ElementTree.fromstring(intervals([("before", Accuracy(0, 10)), ("after", Accuracy(10, 10))]))
    assert len(list(svg.iter("circle"))) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (0.05612, "0.0561"),
        (3.2e-6, "3.2e-6"),
        (1e-3, "0.001"),
        (-2.0, "-2"),
        (1e-4, "1e-4"),
    ],
)
def test_number(value, text):
    assert number(value) == text
