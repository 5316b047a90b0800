"""Supervised training of a small policy from texts, so that an app can ship one that has something left to learn."""

from grpo_trainer.assemble.teach.command import Figures, measure, warmstart
from grpo_trainer.assemble.teach.examples import Example, SupervisedBatch, chat_examples, fill_batches, text_examples
from grpo_trainer.assemble.teach.policy import Recipe, train_policy
from grpo_trainer.assemble.teach.tokenizer import make_tokenizer

__all__ = [
    "Example",
    "Figures",
    "Recipe",
    "SupervisedBatch",
    "chat_examples",
    "fill_batches",
    "make_tokenizer",
    "measure",
    "text_examples",
    "train_policy",
    "warmstart",
]
