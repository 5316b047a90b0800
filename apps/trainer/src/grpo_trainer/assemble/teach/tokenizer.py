"""A tokenizer for a small policy: byte-level BPE with single digits, as Qwen2 has it, trained on the task's own texts.

Training goes on until every word of the texts is one token. Any other text still encodes, in fragments and bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from grpo_trainer.data.tokenizer import TokenizerError

__all__ = ["make_tokenizer"]

_PAD, _TURN, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen2's splitting rule, letter for letter: transformers 5 uses it whatever tokenizer.json says.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML, as Qwen2.5 writes it without a system turn; `generation` marks the tokens that supervised training learns.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, texts: Iterable[str], *, multiple_of: int = 64) -> int:
    """Train a tokenizer and write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: where to write; created if missing.
        texts: what the policy will read and write; the same texts give the same files.
        multiple_of: reserved tokens pad the vocabulary to a multiple of this, so that it divides over devices.

    Returns:
        The size of the vocabulary.

    Raises:
        TokenizerError: ``texts`` is empty.
    """
    read = list(texts)
    if not read:
        raise TokenizerError("texts must hold at least one text to learn words from: got none")
    tokenizer = _train([*read, f"{_TURN}user\n{_END}\n{_TURN}assistant\n"], multiple_of)
    folder.mkdir(parents=True, exist_ok=True)
    # Not tokenizer.save: it raises a bare Exception where the file cannot be written.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": _END,
        "pad_token": _PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def _train(texts: Iterable[str], multiple_of: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there is to merge: training ends when every word is one token
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (_PAD, _TURN, _END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reserved = [f"<|reserved_{index}|>" for index in range(-tokenizer.get_vocab_size() % multiple_of)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    return tokenizer
