"""report.html: self-contained, escaped, and there whatever a run did or did not get to."""

import math
import random
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from toy import TASK, load

from grpo_trainer.evaluate.accuracy import Accuracy
from grpo_trainer.evaluate.records import Answer, Evaluation, Record, compare
from grpo_trainer.report.charts import Series, intervals, lines, number, stacked
from grpo_trainer.report.page import write_report
from grpo_trainer.report.runs import main, write_comparison
from grpo_trainer.report.terminal import printable
from grpo_trainer.run.folder import RunFolder
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.task import Judgement

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
        if tag in ("td", "th"):
            self.words.append(" ")

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


def evaluation(folder: RunFolder, step: int, right: str) -> Evaluation:
    """Records of an evaluation: `x` is right, `s` only leniently; each with two samples, of which one is right."""

    def answer(mark: str) -> Answer:
        return Answer(EVIL, Judgement(mark == "x", mark in "xs", True, read=f"{mark} {EVIL}"), "stop", 3)

    records = [
        Record(n, f"test.jsonl:{n}", f"{n} {EVIL}", EVIL, 9, answer(mark), (answer("x"), answer("-")))
        for n, mark in enumerate(right)
    ]
    file = folder.evaluation(step)
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(record.line("key") for record in records))
    return Evaluation(records)


def finish(folder: RunFolder, before: str, after: str, steps: int = 60) -> None:
    found = evaluation(folder, 0, before), evaluation(folder, steps, after)
    paired = compare(*(result.records for result in found))
    assert paired is not None
    accuracy = {"before": found[0].record(), "after": found[1].record()}
    folder.summary(steps=steps, seconds=1, device="cpu", accuracy=accuracy, paired=paired.record())


def test_problems_won_and_lost_are_shown(folder):
    fill(folder, 3)
    finish(folder, "x--s" * 10, "xx-x" * 9 + "-xxx")
    shown = page(folder)
    assert "25.0 % → 75.0 %" in shown.text
    assert "+50.0 points on 40 held-out problems" in shown.text
    assert "21 won, 1 lost (McNemar's exact p = 1.1e-05)" in shown.text
    assert "may be chance" not in shown.text
    for row in ("strict 25.0% (", "lenient 50.0% (", "mean@2 50.0% (", "pass@2 100.0% (", "maj@2 50.0% ("):
        assert row in shown.text
    assert "Won: 21 problems, the first 12" in shown.text
    assert "Lost: 1 problem" in shown.text
    text = write_report(folder.path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert f"test.jsonl:36 36 {' '.join(printable(EVIL).split())}" in shown.text


def test_a_difference_that_may_be_chance(folder):
    finish(folder, "x-x-x-x-", "x-xxx-x-")
    assert "1 won, 0 lost (McNemar's exact p = 1). This may be chance." in page(folder).text


def run(parent, name: str, *sets: str, steps: int = 0, before: str = "", after: str = "") -> RunFolder:
    config = load([], [f"run.dir={parent / name}", "log.tensorboard=false", *sets])
    with RunFolder(config, {}) as folder:
        if steps:
            fill(folder, steps)
        if before:
            finish(folder, before, after, steps)
    return folder


def test_several_runs_on_one_page(tmp_path, capsys):
    lively = "<b>lively & co"
    folders = [
        run(tmp_path, "first", steps=9, before="x---", after="xx--"),
        run(tmp_path, "second", "seed=1", steps=20, before="x---", after="xxxx"),
        run(tmp_path, lively, "optimizer.learning_rate=1e-2", steps=5),
        run(tmp_path, "new", "seed=2", "rollout.top_p=0.9"),
    ]
    assert main(TASK, [str(folder.path) for folder in folders]) == 0
    file = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"report: {file}\n"
    text = file.read_text()
    assert "<b>lively" not in text
    shown = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(shown.tags)
    assert "4 GRPO runs" in shown.text
    assert f"{lively} 0 5 of 60 – – –" in shown.text
    assert "new 2 0 of 60 – – –" in shown.text
    assert "first and 1 of other seeds 25.0 ± 0.0 % (2 seeds) 75.0 ± 35.4 % (2 seeds) +50.0 ± 35.4 points" in shown.text
    assert "seed 0 1 0 2" in shown.text
    assert "optimizer.learning_rate 0.0003 0.0003 0.01 0.0003" in shown.text
    assert "rollout.top_p 1.0 1.0 1.0 0.9" in shown.text
    for title in ("Reward", "Entropy", "Accuracy: sampled, training problems", "Gradient norm"):
        assert title in shown.text
    bands = [dict(one.attrib) for one in figure(text, "Reward").iter("path") if "band" in one.attrib["class"]]
    assert len(bands) == 1  # of the two seeds, as far as both went
    assert bands[0]["d"].count("L") == 2 * 9 - 1


def figure(text: str, title: str) -> ElementTree.Element:
    start = text.index("<svg", text.index(f"<h3>{title}</h3>"))
    return ElementTree.fromstring(text[start : text.index("</svg>", start) + len("</svg>")])


def test_the_curve_of_seeds_is_their_mean(tmp_path):
    for seed, rewards in enumerate([(1.0, 3.0, 5.0), (3.0, 7.0)]):
        config = load([], [f"run.dir={tmp_path / str(seed)}", "log.tensorboard=false", f"seed={seed}"])
        with RunFolder(config, {}) as folder:
            for step, reward in enumerate(rewards, 1):
                folder.log(step, {"reward": reward})
    file = write_comparison([tmp_path / "0", tmp_path / "1"], tmp_path / "out" / "page.html")
    titles = [title.text for title in figure(file.read_text(), "Reward").iter("title")]
    assert [title.rpartition(": ")[2] for title in titles if title] == ["2", "5"]


def test_runs_of_the_same_name_and_folders_that_are_none(tmp_path):
    for parent in ("a", "b"):
        run(tmp_path / parent, "run", steps=2)
    page = write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "page.html").read_text()
    assert str(tmp_path / "a" / "run") in page
    with pytest.raises(ConfigError, match="nowhere must be the folder of a run"):
        main(TASK, [str(tmp_path / "a" / "run"), str(tmp_path / "nowhere")])
    assert main(TASK, [str(tmp_path / "a" / "run")]) == 0
    assert (tmp_path / "a" / "run" / "report.html").is_file()


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
