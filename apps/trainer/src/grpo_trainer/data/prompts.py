"""How a question is put: system turn, instruction, examples, the model's chat template or one of your own, prefill."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from grpo_contracts import GrpoError
from grpo_trainer.task import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which no tokenizer takes
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

__all__ = ["PromptError", "PromptStyle", "encode_prompts", "prompt_digest"]


class PromptError(GrpoError, ValueError):
    """A prompt cannot be made as the settings ask."""


@dataclass(frozen=True)
class PromptStyle:
    """How questions are put to the policy.

    Args:
        system: text of the system turn; empty for none.
        instruction: what to ask for. With ``{question}`` in it, it stands around the question; else after it.
        examples: solved problems to show first, as earlier turns.
        template: text with ``{prompt}`` to use in place of a chat template; empty for the model's own.
        prefill: text that the completion continues.
        arguments: of the chat template, such as ``enable_thinking``.
        date: that templates which print today's date are given, as YYYY-MM-DD.
    """

    system: str = ""
    instruction: str = ""
    examples: tuple[Problem, ...] = ()
    template: str = ""
    prefill: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: str = "2024-07-26"

    def user_turn(self, question: str) -> str:
        """The question with the instruction."""
        if not self.instruction:
            return question
        if "{question}" in self.instruction:
            return self.instruction.replace("{question}", question)
        return f"{question}\n\n{self.instruction}"

    def messages(self, question: str) -> list[dict[str, str]]:
        """The conversation as a chat template takes it, up to the user's last turn."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for example in self.examples:
            turns.append({"role": "user", "content": self.user_turn(example.question)})
            turns.append({"role": "assistant", "content": example.answer})
        return [*turns, {"role": "user", "content": self.user_turn(question)}]

    def write(self, question: str) -> str:
        """The whole prompt by `template`: the system text, the examples, the question, each in its own paragraph."""

        def put(text: str) -> str:
            return self.template.replace("{prompt}", text)

        shown = [f"{put(self.user_turn(example.question))}{example.answer}" for example in self.examples]
        return "\n\n".join([*([self.system] if self.system else []), *shown, put(self.user_turn(question))])


def encode_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, style: PromptStyle
) -> list[list[int]]:
    """Turn problems into token ids: text becomes ids here, once, and never back and again.

    Args:
        problems: to put to the policy.
        tokenizer: the policy's.
        style: how.

    Returns:
        The ids of each prompt, unpadded, with the template's own special tokens.

    Raises:
        PromptError: there is no template, it fails, it writes what is no text, it leaves the question out, or it
            writes BOS twice.
    """
    texts = _by_template(problems, tokenizer, style) if style.template else _by_chat(problems, tokenizer, style)
    which = "prompt.template" if style.template else "the chat template"
    for problem, text in zip(problems, texts):
        if _SURROGATE.search(text):
            raise PromptError(f"{problem.place}: {which} must write text: half a surrogate pair is in {text[:200]!a}")
        if _letters(problem.question) not in _letters(text):
            raise PromptError(
                f"{problem.place}: {which} must keep the question: it wrote {text[:200]!r} for "
                f"{problem.question[:200]!r}"
            )
    texts = [text + style.prefill for text in texts]
    # The template has written every special token: the tokenizer must add none of its own.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    ids = cast("list[list[int]]", encoded["input_ids"])
    if style.template:
        prefix = _added_prefix(tokenizer)
        ids = [row if row[: len(prefix)] == prefix else [*prefix, *row] for row in ids]
    _check_bos(ids, problems, tokenizer)
    return ids


def prompt_digest(tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> str:
    """Identify how questions are put, whatever they are: the ids of one fixed question.

    Args:
        tokenizer: the policy's.
        style: how.

    Returns:
        sha256 in hexadecimal; it changes with the template, its date, the instruction or the examples.
    """
    probe = Problem("How many are 1 and 1?", "2", "the probe")
    return sha256(json.dumps(encode_prompts([probe], tokenizer, style)).encode()).hexdigest()


def _by_template(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> list[str]:
    return [style.write(problem.question) for problem in problems]


def _by_chat(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, style: PromptStyle) -> list[str]:
    if tokenizer.chat_template is None:
        raise PromptError(
            "the tokenizer has no chat template, as that of a base model: set prompt.template, such as "
            "'Question: {prompt}\\nAnswer:'"
        )
    pinned = datetime.strptime(style.date, "%Y-%m-%d")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise PromptError(
            f"the tokenizer has several chat templates and no default: set prompt.template: {error}"
        ) from error
    if not isinstance(template, str):
        raise PromptError(f"the tokenizer's chat template must be text: got a {type(template).__name__}")
    template = _with_date(template, pinned)
    arguments = {"date_string": pinned.strftime("%d %b %Y"), **style.arguments}
    conversations = [style.messages(problem.question) for problem in problems]
    try:
        return cast(
            "list[str]",
            tokenizer.apply_chat_template(
                conversations, chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
            ),
        )
    # What a template computes may fail in any way that Python's operators do, and jinja2 compiles it to Python first.
    except (
        TemplateError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        turns = "system, user" if style.system else "user"
        raise PromptError(
            f"the chat template fails on a conversation of {turns}: {type(error).__name__}: {str(error)[:300]}. "
            "It may not without prompt.system or with other prompt.arguments; prompt.template replaces it"
        ) from error


def _with_date(template: str, date: datetime) -> str:
    """The template with `strftime_now('...')` written out: no prompt changes with the day.

    transformers hands templates plain data only, so a function of our own could not take its place.
    """
    written = _TODAY.sub(lambda call: json.dumps(date.strftime(call[2])), template)
    if "strftime_now(" in written:
        raise PromptError(
            "the chat template must call strftime_now with a text, so that prompt.date can take today's place: got "
            f"{written[written.index('strftime_now(') :][:80]!r}. Set prompt.template"
        )
    return written


def _added_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text by itself: BOS, or nothing."""
    plain = cast("list[int]", tokenizer("a", add_special_tokens=False)["input_ids"])
    marked = cast("list[int]", tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((at for at in range(len(marked)) if marked[at : at + len(plain)] == plain), 0)
    return marked[:at]


def _check_bos(ids: Sequence[Sequence[int]], problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
    bos = tokenizer.bos_token_id
    for row, problem in zip(ids, problems):
        # Only at the beginning: there are models, such as SmolLM2, whose BOS also begins every turn.
        if bos is not None and list(row[:2]) == [bos, bos]:
            raise PromptError(
                f"{problem.place}: a prompt must begin with one BOS ({tokenizer.bos_token!r}): this one begins with "
                "two. Take one out of prompt.template or prompt.system"
            )


def _letters(text: str) -> str:
    """Without white space, which templates trim and fold."""
    return re.sub(r"\s+", "", text)
