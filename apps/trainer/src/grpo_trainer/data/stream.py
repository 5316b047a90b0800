"""Prompts for every step: grain shuffles the problems by (seed, epoch), and each step takes the next few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import grain
import numpy as np

from grpo_contracts import Prompts
from grpo_trainer.data.filter import filter_problems
from grpo_trainer.data.prompts import PromptStyle, encode_prompts
from grpo_trainer.data.sources import DataError, digest, read_problems
from grpo_trainer.data.tokenizer import padding_id
from grpo_trainer.report.terminal import printable
from grpo_trainer.task import Problem, Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_trainer.settings.schema import Settings

Overlong = Literal["refuse", "drop"]

_LAST_PROBLEM = 2**48  # so many are put to the policy in no run
_SHOWN = 600  # characters of a prompt in a message
_LONGEST_TOKEN = 256  # characters; that no prompt has on average for each of its tokens


@dataclass(frozen=True)
class ProblemBatch:
    """Problems with their prompts.

    Args:
        prompts: their token ids, padded to one length for the whole run.
        problems: what they say, in the same order.
        dropped: how many over-long ones of their split were left out.
    """

    prompts: Prompts
    problems: tuple[Problem, ...]
    dropped: int = 0


@dataclass(frozen=True)
class Questions:
    """A data set whose prompts are token ids already: the chat template is applied once, here.

    Args:
        problems: those that fit.
        tokens_NT: prompts, right-padded.
        length_N: their lengths in tokens.
        vocab_size: ids are below it.
        pad_id: fills the rows up.
        dropped: how many over-long problems were left out.
        digest: of the problems that fit.
        filtered: what `data.filter` left out, in words; empty without it.
    """

    problems: tuple[Problem, ...]
    tokens_NT: np.ndarray
    length_N: np.ndarray
    vocab_size: int
    pad_id: int
    dropped: int
    digest: str
    filtered: str = ""

    def take(self, prompt_id_P: Sequence[int] | np.ndarray) -> ProblemBatch:
        """Pick problems.

        Args:
            prompt_id_P: their indices in the data set, plus its size for every epoch before: samples are a function of
                the prompt id, and a problem that comes again in the same step must not get the same ones.
        """
        prompt_id_P = np.asarray(prompt_id_P)
        index_P = prompt_id_P % len(self.problems)
        prompts = Prompts(
            tokens_PT=self.tokens_NT[index_P],
            length_P=self.length_N[index_P],
            prompt_id_P=(prompt_id_P % 2**31).astype(np.int32),
            vocab_size=self.vocab_size,
            pad_id=self.pad_id,
        )
        return ProblemBatch(prompts, tuple(self.problems[index] for index in index_P), self.dropped)


def tokenize(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: PromptStyle | None = None,
    max_length: int,
    overlong: Overlong = "refuse",
    vocab_size: int | None = None,
) -> Questions:
    """Turn problems into prompts of one padded length.

    Args:
        problems: to put to the policy.
        tokenizer: the policy's.
        style: how questions are put; None is the bare question in the model's chat template.
        max_length: tokens of the longest prompt; every row is padded to it, so that no batch compiles anew.
        overlong: what to do with longer ones: refuse the data set, naming the first, or drop and count them.
        vocab_size: the model's; None is the tokenizer's.

    Returns:
        The data set as token ids.

    Raises:
        DataError: if a prompt is too long, or none is left, or ids do not fit the model's vocabulary.
        PromptError: if a prompt cannot be made.
    """
    if not problems:
        raise DataError("there must be at least one problem besides those of prompt.examples: there is none")
    huge = next((problem for problem in problems if len(problem.question) > _LONGEST_TOKEN * max_length), None)
    if huge is not None and overlong == "refuse":
        raise DataError(
            f"{huge.place}: a prompt must have at most {max_length} tokens (data.max_prompt_length): the question of "
            f"this one has {len(huge.question):,} characters"
        )
    # Nobody waits for megabytes to become tokens that cannot fit.
    read = [problem for problem in problems if len(problem.question) <= _LONGEST_TOKEN * max_length]
    ids = encode_prompts(read, tokenizer, PromptStyle() if style is None else style)
    fitting = [n for n, row in enumerate(ids) if len(row) <= max_length]
    if overlong == "refuse" and len(fitting) < len(read):
        first = next(n for n, row in enumerate(ids) if len(row) > max_length)
        raise DataError(
            f"{read[first].place}: a prompt must have at most {max_length} tokens (data.max_prompt_length): "
            f"this one has {len(ids[first])}, {len(read) - len(fitting)} of {len(read)} are too long, "
            f"the longest has {(longest := max(map(len, ids)))}. Set data.max_prompt_length={longest}, or "
            f"data.overlong=drop to leave those out. As the model sees it: {_shown(tokenizer, ids[first])}"
        )
    if not fitting:
        raise DataError(
            f"a problem must fit in {max_length} tokens (data.max_prompt_length): none of {len(problems)} does"
        )
    pad_id = padding_id(tokenizer)
    tokens_NT = np.full((len(fitting), max_length), pad_id, np.int32)
    for row, n in enumerate(fitting):
        tokens_NT[row, : len(ids[n])] = ids[n]
    size = len(tokenizer) if vocab_size is None else vocab_size
    if tokens_NT.max() >= size:
        raise DataError(
            f"prompts must hold ids below the model's vocabulary of {size}: got {tokens_NT.max()}. "
            "Is this the model's own tokenizer?"
        )
    kept = tuple(read[n] for n in fitting)
    length_N = np.array([len(ids[n]) for n in fitting], np.int32)
    return Questions(kept, tokens_NT, length_N, size, pad_id, len(problems) - len(fitting), digest(kept))


class ProblemStream(Iterator[ProblemBatch]):
    """Problems for one step after another, without end; which ones is a function of (seed, step) alone.

    An epoch is a shuffle of all problems; the next epoch begins where one ends, in the middle of a step if need be,
    so each problem comes exactly once an epoch. Every process walks the same order and takes its share of each step:
    a saved state fits any number of processes.

    Args:
        questions: the data set.
        count: problems of one step, over all processes.
        seed: of the order.
        shard: this process's number among ``shards``, which must divide ``count``.
        shards: how many processes share a step.

    Raises:
        DataError: if the shares do not come out even.
    """

    def __init__(self, questions: Questions, *, count: int, seed: int, shard: int = 0, shards: int = 1) -> None:
        if count < 1 or not 0 <= shard < shards or count % shards:
            raise DataError(
                f"{count} problems a step must split evenly over the processes: this is number {shard} of {shards}"
            )
        self.questions = questions
        share = count // shards
        size = len(questions.problems)
        # Not endless: grain cannot count batches of one of a data set as long as an integer can say.
        order = grain.MapDataset.range(size).seed(seed).shuffle().repeat(_LAST_PROBLEM // size)
        ids = order.map_with_index(lambda position, index: index + position // size * size)
        mine = ids.batch(count).map(lambda id_P: id_P[shard * share : (shard + 1) * share])
        # The work is a few array look-ups: threads that read ahead would only take time from the rollout.
        self._steps = iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    @property
    def digest(self) -> str:
        """sha256 of the problems."""
        return self.questions.digest

    def __next__(self) -> ProblemBatch:
        return self.questions.take(next(self._steps))

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON."""
        return dict(self._steps.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called."""
        self._steps.set_state(state)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The prompt in one line, cut to what a message can hold."""
    text = printable(str(tokenizer.decode(list(ids))), newlines=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class Reader:
    """Reads a run's problems and puts them to its policy.

    Args:
        settings: ``data``, ``prompt``, ``rollout.prompts``, ``eval.problems`` and ``seed`` are read.
        task: reads the problems.
        tokenizer: the policy's.
        vocab_size: the model's.
    """

    settings: Settings
    task: Task
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int

    def style(self) -> PromptStyle:
        """How questions are put."""
        prompt = self.settings.prompt
        examples: Sequence[Problem] = ()
        if prompt.examples_file:
            examples = read_problems(prompt.examples_file, "train")
        elif prompt.examples:
            examples = self._split("train", prompt.examples)
        return PromptStyle(
            system=prompt.system,
            instruction=prompt.instruction or "",
            examples=tuple(examples),
            template=prompt.template,
            prefill=prompt.prefill,
            arguments=prompt.arguments,
            date=prompt.date,
        )

    def training(self) -> ProblemStream:
        """Open the training problems that `data.filter` keeps, less those that are shown as examples.

        Raises:
            DataError, PromptError: they cannot be read or do not fit.
        """
        questions = self._training(by_pass_rate=True)
        return ProblemStream(questions, count=self.settings.rollout.prompts, seed=self.settings.seed)

    def to_measure(self) -> ProblemBatch:
        """Read the training problems whose pass rate is to be measured: `data.filter.pass_rate` does not apply.

        Raises:
            DataError, PromptError: they cannot be read or do not fit.
        """
        questions = self._training(by_pass_rate=False)
        return questions.take(range(len(questions.problems)))

    def held_out(self) -> ProblemBatch:
        """Read the problems of every evaluation: the first ``eval.problems`` of the test split, or all of fewer.

        Raises:
            DataError, PromptError: they cannot be read or do not fit.
        """
        problems = self._split("test", self.settings.eval.problems)
        questions = self._fitting(problems, self.style())
        return questions.take(range(len(questions.problems)))

    def _training(self, *, by_pass_rate: bool) -> Questions:
        style, data = self.style(), self.settings.data
        shown = {example.question for example in style.examples}
        limit = data.train_size + self.settings.prompt.examples if data.train_size else 0
        problems = [problem for problem in self._split("train", limit) if problem.question not in shown]
        kept, filtered = filter_problems(problems, data.filter, by_pass_rate=by_pass_rate)
        return replace(self._fitting(kept, style), filtered=filtered)

    def _split(self, split: Split, limit: int) -> Sequence[Problem]:
        data = self.settings.data
        source = data.test_source or data.source if split == "test" else data.source
        return self.task.problems(source, split, limit)

    def _fitting(self, problems: Sequence[Problem], style: PromptStyle) -> Questions:
        data = self.settings.data
        return tokenize(
            problems,
            self.tokenizer,
            style=style,
            max_length=data.max_prompt_length,
            overlong=data.overlong,
            vocab_size=self.vocab_size,
        )
