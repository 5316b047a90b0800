"""Reading, shuffling and sharing out problems, and what is said about bad ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import END, TASK, load

from grpo_contracts import GrpoError, validate
from grpo_trainer.data.hub import is_hub_id
from grpo_trainer.data.sources import DataError, digest, read_problems
from grpo_trainer.data.stream import ProblemStream, Questions, Reader, tokenize
from grpo_trainer.data.tokenizer import TokenizerError, end_ids, load_tokenizer, padding_id
from grpo_trainer.task import Problem, Split

GOOD = '{"question": "1 + 1?", "answer": "=2"}'


@pytest.fixture(scope="module")
def tokenizer(toy_policy: Path) -> Any:
    return load_tokenizer(toy_policy)


@pytest.fixture(scope="module")
def questions(tokenizer: Any) -> Questions:
    return tokenize(TASK.problems("embedded", "train", 50), tokenizer, max_length=40)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", ":2 must be one JSON object a line"),
        ('{"question": "a", "answer": "b"} x', ":2 must be one JSON object a line: Extra data at column"),
        ("[1]", ":2 must be a JSON object with question and answer: got list"),
        ("", ":2 must hold a problem: the line is empty"),
        ('{"answer": "#### 2"}', ":2 must have the field 'question': it has 'answer'"),
        ('{"question": "2 + 2?"}', ":2 must have the field 'answer'"),
        ('{"question": "2 + 2?", "answer": 4}', ":2: answer must be a text that is not empty: got 4"),
        ('{"question": " ", "answer": "#### 4"}', ":2: question must be a text that is not empty"),
        (GOOD, r":2 must not repeat the question of .*bad\.jsonl:1: '1 \+ 1\?'"),
        (b'{"question": "\xff", "answer": "#### 4"}', ":2 must be UTF-8"),
        ("[" * 200_000, ":2 must be one JSON object a line: its brackets are too deep"),
        ('{"question": "a", "answer": "b", "n": ' + "1" * 5000 + "}", ":2 must hold numbers of at most 4,300 digits"),
        (r'{"question": "What \ud800 is?", "answer": "b"}', r":2: 'question' must be Unicode text"),
        (r'{"question": "a", "answer": "b", "more": [{"\udfff": 1}]}', r":2: 'more' must be Unicode text"),
        (r'{"question": "a", "answer": "b", "\udfff": 1}', r":2: '\\udfff' must be Unicode text"),
        ('{"question": "a", "answer": "' + "b" * 10_000_000 + '"}', ":2 must have at most 10,000,000 bytes"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, second: str | bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + (second.encode() if isinstance(second, str) else second) + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read_problems(str(path), "train")
    assert isinstance(caught.value, GrpoError)
    assert isinstance(caught.value, ValueError)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="must hold at least one problem: it is empty"):
        read_problems(str(tmp_path), "train")
    with pytest.raises(DataError, match=r"must hold test\.jsonl or test\.parquet: it holds train\.jsonl"):
        read_problems(str(tmp_path), "test")
    for source in ("not/here/at/all", "nowhere.jsonl", "./train"):
        with pytest.raises(DataError, match=f"there is no {Path(source).absolute()}"):
            read_problems(source, "train")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("place", ["", "main", "default", "data"])
@pytest.mark.parametrize("name", ["{split}", "{split}-00000-of-00001", "{split}-0000{part}-of-00003"])
def test_a_snapshot_of_a_hub_data_set_is_read_as_a_folder(tmp_path: Path, suffix: str, place: str, name: str) -> None:
    """As `hf download` and `push_to_hub` lay it out, in one part or several, beside another configuration."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parts = 3 if "{part}" in name else 1
    for folder, first in ((place, 0), ("socratic", 500)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for split, add in (("train", 0), ("test", 100)):
            for part in range(parts):
                file = tmp_path / folder / f"{name.format(split=split, part=part)}.{suffix}"
                some = rows(first + add + 4 * part + 4)[-4:]
                if suffix == "parquet":
                    parquet.write_table(pyarrow.Table.from_pylist(some), file)
                else:
                    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "README.md").touch()
    splits: dict[Split, int] = {"train": 0, "test": 100}
    for split, add in splits.items():
        expected = [row["question"] for row in rows(add + 4 * parts)[add:]]
        assert [problem.question for problem in read_problems(str(tmp_path), split)] == expected
    if parts > 1:
        next((tmp_path / place).glob("train-00001*")).unlink()
        with pytest.raises(DataError, match="must hold all 00003 parts of train: 2 are there"):
            read_problems(str(tmp_path), "train")


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    """As `datasets.DatasetDict.save_to_disk` writes it: Arrow streams in a folder for each split."""
    pyarrow = pytest.importorskip("pyarrow")
    for split, size in (("train", 5), ("test", 3)):
        (tmp_path / split).mkdir()
        table = pyarrow.Table.from_pylist(rows(size))
        with pyarrow.ipc.new_stream(tmp_path / split / "data-00000-of-00001.arrow", table.schema) as file:
            file.write_table(table)
        (tmp_path / split / "state.json").write_text("{}")
    assert len(read_problems(str(tmp_path), "train")) == 5
    assert len(read_problems(str(tmp_path), "test")) == 3


def test_a_hub_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError("no network here.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=r"openai/gsm8k is not a file or folder here, and .* no network here\. Without"):
        read_problems("openai/gsm8k", "train")


def test_a_hub_data_set_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("somebody/sums", "dataset")
        assert {"train*", "main/train*", "data/train*"} <= set(allow_patterns)
        return str(tmp_path)

    (tmp_path / "train.jsonl").write_text(GOOD + "\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert [problem.answer for problem in read_problems("somebody/sums", "train")] == ["=2"]


@pytest.mark.parametrize("name", ["../models", "./models/a", "a/b/c", "~/a", "a--b/c", "runs/a--b", "a/..", "here/a"])
def test_a_path_that_is_misspelt_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not is_hub_id(name)
    assert is_hub_id("Qwen/Qwen2.5-0.5B")
    with pytest.raises(DataError, match=r"there is no|cannot be read|must hold"):
        read_problems(name, "train")


def test_a_damaged_parquet_file_is_said(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows(500)), file)
    whole = file.read_bytes()
    for damaged in (b"", b"PAR1garbage", whole[:-20], whole[: len(whole) // 2] + b"\0" * 64 + whole[-300:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.parquet must be a Parquet file that is whole"):
            read_problems(str(file), "train")


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"{n} + 1?", "answer": f"={n + 1}"} for n in range(count)]


def write_splits(folder: Path, **sizes: int) -> None:
    for split, count in sizes.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))


def test_jsonl_is_read_whole_or_from_the_beginning(tmp_path: Path) -> None:
    write_splits(tmp_path, train=40, test=20)
    sizes: dict[Split, int] = {"train": 40, "test": 20}
    for split, count in sizes.items():
        problems = read_problems(str(tmp_path), split)
        assert [{"question": problem.question, "answer": problem.answer} for problem in problems] == rows(count)
        assert problems[6].place == f"{tmp_path / split}.jsonl:7"
    seven = read_problems(str(tmp_path / "train.jsonl"), "test", limit=7)  # a file is itself, whatever the split
    assert [problem.question for problem in seven] == [row["question"] for row in rows(7)]


def test_every_further_column_is_kept(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1?", "answer": "=1", "numbers": [3, 5], "level": null}\n')
    (problem,) = read_problems(str(tmp_path), "train")
    assert problem.columns == {"numbers": [3, 5], "level": None}


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows(5)), tmp_path / "train.parquet")
    write_splits(tmp_path, train=5)
    assert digest(read_problems(str(tmp_path / "train.parquet"), "train")) == digest(
        read_problems(str(tmp_path / "train.jsonl"), "train")
    )


def test_a_digest_is_of_what_the_problems_say() -> None:
    one = digest([Problem("a", "b", "x:1")])
    assert one == digest([Problem("a", "b", "elsewhere")])
    assert one not in (digest([Problem("a", "c", "x:1")]), digest([Problem("a", "b", "x:1")] * 2), digest([]))


def test_prompts_are_the_chat_template_once(questions: Questions, tokenizer: Any) -> None:
    batch = questions.take([3, 1])
    validate(batch.prompts, level="values")
    assert batch.prompts.prompt_id_P.tolist() == [3, 1]
    ids = batch.prompts.tokens_PT[0, : batch.prompts.length_P[0]]
    question = questions.problems[3].question
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert batch.problems == (questions.problems[3], questions.problems[1])


def test_overlong_prompts_are_refused_or_dropped(tokenizer: Any) -> None:
    problems = [
        Problem("short", "=1", "f:1"),
        Problem("long " * 50, "=1", "f:2"),
        Problem("long " * 60, "=1", "f:3"),
    ]
    with pytest.raises(DataError, match=r"f:2: a prompt must have at most 40 tokens .* 2 of 3 are too long"):
        tokenize(problems, tokenizer, max_length=40)
    kept = tokenize(problems, tokenizer, max_length=40, overlong="drop")
    assert (kept.dropped, [problem.place for problem in kept.problems]) == (2, ["f:1"])
    with pytest.raises(DataError, match="none of 2 does"):
        tokenize(problems[1:], tokenizer, max_length=40, overlong="drop")


def test_a_question_of_megabytes_is_not_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        "grpo_trainer.data.stream.encode_prompts",
        lambda problems, *_: read.extend(problem.place for problem in problems) or [[1]] * len(problems),
    )
    problems = [Problem("short", "=1", "f:1"), Problem("long " * 400_000, "=1", "f:2")]
    with pytest.raises(DataError, match=r"f:2: a prompt must have at most 40 tokens .* 2,000,000 characters"):
        tokenize(problems, tokenizer, max_length=40)
    assert tokenize(problems, tokenizer, max_length=40, overlong="drop").dropped == 1
    assert read == ["f:1"]


def test_ids_beyond_the_models_vocabulary_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="below the model's vocabulary of 100"):
        tokenize([Problem("apples", "=1", "f:1")], tokenizer, max_length=40, vocab_size=100)


def _ids(stream: ProblemStream, steps: int) -> list[int]:
    return [int(index) for _ in range(steps) for index in next(stream).prompts.prompt_id_P]


def test_every_problem_once_an_epoch_in_an_order_of_its_own(questions: Questions) -> None:
    ids = _ids(ProblemStream(questions, count=4, seed=1), 25)  # 100 = two epochs of 50; an epoch ends within a step
    assert Counter(ids[:50]) == Counter(range(50))
    assert Counter(ids[50:]) == Counter(range(50, 100))  # of a second epoch: ids of their own, and so samples
    assert ids[:50] != [index - 50 for index in ids[50:]]
    assert ids == _ids(ProblemStream(questions, count=4, seed=1), 25)
    assert ids != _ids(ProblemStream(questions, count=4, seed=2), 25)
    assert ids == _ids(ProblemStream(questions, count=10, seed=1), 10)  # the order does not know the steps


@pytest.mark.parametrize("count", [1, 49, 50, 51, 120])
def test_a_problem_that_comes_twice_in_a_step_gets_samples_of_its_own(questions: Questions, count: int) -> None:
    stream = ProblemStream(questions, count=count, seed=1)
    for _ in range(3):
        batch = next(stream)
        validate(batch.prompts, level="values")
        ids = batch.prompts.prompt_id_P.tolist()
        assert len(set(ids)) == count
        assert batch.problems == tuple(questions.problems[index % 50] for index in ids)
        expected_PT = questions.tokens_NT[np.array(ids) % 50]
        np.testing.assert_array_equal(batch.prompts.tokens_PT, expected_PT)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_processes_share_each_step(questions: Questions, shards: int) -> None:
    whole = ProblemStream(questions, count=10, seed=3)
    parts = [ProblemStream(questions, count=10, seed=3, shard=n, shards=shards) for n in range(shards)]
    for _ in range(12):
        shared = np.concatenate([next(part).prompts.prompt_id_P for part in parts])
        np.testing.assert_array_equal(shared, next(whole).prompts.prompt_id_P)


@pytest.mark.parametrize("kwargs", [{"count": 0}, {"count": 10, "shards": 3}, {"count": 10, "shard": 2, "shards": 2}])
def test_uneven_shares_are_refused(questions: Questions, kwargs: dict[str, int]) -> None:
    with pytest.raises(DataError, match="split evenly"):
        ProblemStream(questions, seed=0, **kwargs)


@pytest.mark.parametrize("taken", [0, 1, 13])
def test_state_goes_on_exactly_also_with_other_processes(questions: Questions, taken: int) -> None:
    stream = ProblemStream(questions, count=8, seed=5)
    _ids(stream, taken)
    state = json.loads(json.dumps(stream.get_state()))
    expected = _ids(stream, 9)
    again = ProblemStream(questions, count=8, seed=5)
    again.set_state(state)
    assert _ids(again, 9) == expected
    halves = [ProblemStream(questions, count=8, seed=5, shard=n, shards=2) for n in range(2)]
    for half in halves:
        half.set_state(state)
    assert [index for _ in range(9) for half in halves for index in _ids(half, 1)] == expected


def test_opened_as_the_settings_say(tokenizer: Any, tmp_path: Path) -> None:
    write_splits(tmp_path, train=30, test=20)
    given = load([], [f"data.source={tmp_path}", "data.train_size=25", "rollout.prompts=6", "eval.problems=500"])
    stream = Reader(given, TASK, tokenizer, 704).training()
    first = next(stream)
    assert first.prompts.tokens_PT.shape == (6, given.data.max_prompt_length)
    assert first.prompts.vocab_size == 704
    assert len(stream.questions.problems) == 25
    assert len(stream.digest) == 64
    test = Reader(given, TASK, tokenizer, 704).held_out()
    assert [problem.place for problem in test.problems] == [f"{tmp_path / 'test.jsonl'}:{n}" for n in range(1, 21)]
    elsewhere = given.data.model_copy(update={"test_source": "embedded"})
    apart = Reader(given.model_copy(update={"data": elsewhere}), TASK, tokenizer, 704).held_out()
    assert [problem.place for problem in apart.problems] == [f"embedded test:{n}" for n in range(1, 26)]


def with_tokenizer_entries(policy: Path, folder: Path, **entries: Any) -> Path:
    """A copy of a policy's tokenizer with other entries of its tokenizer_config.json."""
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_bytes((policy / name).read_bytes())
    old = json.loads((policy / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(old | entries))
    return folder


def test_a_tokenizer_without_an_end_is_refused(toy_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="must have an eos_token, which ends a completion"):
        load_tokenizer(with_tokenizer_entries(toy_policy, tmp_path, eos_token=None))


@pytest.mark.parametrize("pad", [END, None])
def test_padding_is_told_by_lengths_and_not_by_an_id(toy_policy: Path, tmp_path: Path, pad: str | None) -> None:
    """A tokenizer that pads with its end token, or with nothing, pads all the same."""
    tokenizer = load_tokenizer(with_tokenizer_entries(toy_policy, tmp_path, pad_token=pad))
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    batch = tokenize(TASK.problems("embedded", "train", 3), tokenizer, max_length=40).take([0])
    validate(batch.prompts, level="values")
    assert batch.prompts.tokens_PT[0, batch.prompts.length_P[0] :].tolist() == [tokenizer.eos_token_id] * 15


def test_every_end_token_of_a_model_ends_a_completion(tokenizer: Any, tmp_path: Path) -> None:
    """As its makers published it: ids of the tokenizer, config.json and generation_config.json."""
    own = tokenizer.eos_token_id
    assert end_ids(tokenizer, tmp_path, ()) == (own,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [200, 201]}')
    assert set(end_ids(tokenizer, tmp_path, (100, 200))) == {own, 100, 200, 201}
