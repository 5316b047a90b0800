"""The embedded policy's tokenizer: every word of the generated problems is one token, about 35 tokens a prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from grpo_gsm8k.embedded.problems import generate
from grpo_trainer.assemble.teach import make_tokenizer
from grpo_trainer.settings.paths import argument_path, writing_to
from grpo_trainer.task import Task

__all__ = ["main", "texts"]


def texts() -> list[str]:
    """What the tokenizer is trained on: questions and answers of generated problems."""
    return [text for problem in generate("train", 4_000) for text in (problem.question, problem.answer)]


def main(_: Task, arguments: Sequence[str]) -> int:
    """``make-tokenizer``: write the tokenizer of the embedded problems."""
    parser = argparse.ArgumentParser(prog="grpo-gsm8k make-tokenizer", description=main.__doc__)
    parser.add_argument("folder", type=argument_path)
    given = parser.parse_args(arguments)
    with writing_to(given.folder):
        count = make_tokenizer(given.folder, texts())
    print(f"{given.folder}: {count} tokens")
    return 0
