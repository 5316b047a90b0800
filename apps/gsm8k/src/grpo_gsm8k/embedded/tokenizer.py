"""The embedded policy's tokenizer: Qwen2's own kind, with the generated problems' words for a vocabulary.

A Hugging Face ``tokenizer.json`` like any: byte-level BPE after Qwen2's splitting rule, single digits. It is trained on
the generated problems until every word of theirs is one token (some 620 tokens with the 256 bytes), so prompts come out
at about 35 tokens and any other text at all still encodes, in bytes and fragments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from grpo_gsm8k.embedded.problems import generate
from grpo_trainer.data.tokenizer import TokenizerError
from grpo_trainer.task import Task

PAD, TURN, END = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen2's splitting rule, letter for letter: transformers 5 uses it whatever tokenizer.json says.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML, as Qwen2.5 writes it without a system turn; `generation` marks what a trainer of answers may learn from.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, *, problems: int = 4_000, seed: int = 0, multiple_of: int = 64) -> int:
    """Make the tokenizer from generated problems and write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: where to; made if missing.
        problems: how many generated problems to read the words from.
        seed: of the generator.
        multiple_of: the vocabulary is filled up with reserved tokens to a multiple of this, to divide over devices.

    Returns:
        The vocabulary's size.

    Raises:
        TokenizerError: if ``problems`` is not positive.
    """
    if problems < 1:
        raise TokenizerError(f"problems must be positive, to read words from: got {problems}")
    texts = [text for problem in generate("train", problems, seed=seed) for text in (problem.question, problem.answer)]
    tokenizer = _build([*texts, f"{TURN}user\n{END}\n{TURN}assistant\n"], multiple_of)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def main(_: Task, arguments: Sequence[str]) -> int:
    """``make-tokenizer``: write the tokenizer of the embedded problems."""
    parser = argparse.ArgumentParser(prog="grpo-gsm8k make-tokenizer", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    print(f"{given.folder}: {make_tokenizer(given.folder)} tokens")
    return 0


def _build(texts: Iterable[str], multiple_of: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there is to merge: training ends when every word is one token
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PAD, TURN, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reserved = [f"<|reserved_{index}|>" for index in range(-tokenizer.get_vocab_size() % multiple_of)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    return tokenizer
