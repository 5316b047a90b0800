"""Stop strings as an automaton over tokens, for a sampler that knows no text.

Exact at the level of bytes: a completion ends with the first token after which the bytes of its tokens contain a stop
string, wherever the string begins and ends within tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from grpo_trainer.data.tokenizer import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cut_at_stop", "stop_table", "token_bytes"]


def stop_table(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], vocab_size: int) -> np.ndarray:
    """Compile stop strings for `grpo_sampler.Sampler`.

    Args:
        tokenizer: the policy's.
        strings: at least one, none empty.
        vocab_size: the model's; ids beyond the tokenizer have no text.

    Returns:
        int16 [states, vocab_size]: the next state for each state and token, -1 where the token completes a string.
        State 0 is the start of a completion.

    Raises:
        TokenizerError: it is not known which bytes the tokenizer's tokens stand for.

    Source: Aho and Corasick 1975.
    """
    pieces, stripped = token_bytes(tokenizer), _strips_first_space(tokenizer)
    delta_Ab = _byte_automaton([string.encode() for string in strings])
    length_V = np.array([*map(len, pieces)] + [0] * (vocab_size - len(pieces)))
    state_AV = np.repeat(np.arange(len(delta_Ab), dtype=np.int16)[:, None], vocab_size, axis=1)
    for place in range(length_V.max()):
        (reach_N,) = np.nonzero(length_V > place)
        byte_N = np.array([pieces[token][place] for token in reach_N])
        now_AN = state_AV[:, reach_N]
        state_AV[:, reach_N] = np.where(now_AN < 0, -1, delta_Ab[now_AN, byte_N])
    if stripped:
        # The start becomes a state of its own, in which a token's first space does not exist.
        without = [piece.removeprefix(b" ") for piece in pieces]
        first_V = np.array([_run(delta_Ab, piece) for piece in without] + [0] * (vocab_size - len(pieces)), np.int16)
        state_AV = np.concatenate([first_V[None], state_AV]) + 1
        state_AV[state_AV == 0] = -1
    return state_AV


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((at for string in strings if (at := text.find(string)) >= 0), default=len(text))]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each token id contributes to a decoded text, special tokens included.

    Args:
        tokenizer: byte-level, or with byte fallback as SentencePiece has it.

    Returns:
        Bytes by id; empty for ids without a token.

    Raises:
        TokenizerError: another kind of tokenizer.
    """
    kinds = [decoder["type"] for decoder in _decoders(tokenizer)]
    if kinds == ["ByteLevel"]:
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}

        def read(piece: str) -> bytes:
            if all(letter in byte_of for letter in piece):
                return bytes(byte_of[letter] for letter in piece)
            return piece.encode()

    elif "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:

        def read(piece: str) -> bytes:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()

    else:
        raise TokenizerError(
            "rollout.stop needs a tokenizer that is byte-level or has byte fallback, as those of Qwen and Llama are: "
            f"this one decodes by {', '.join(kinds) or 'nothing'}. Leave rollout.stop empty"
        )
    size = len(tokenizer)
    added = tokenizer.added_tokens_decoder
    pieces = cast("list[str | None]", tokenizer.convert_ids_to_tokens(list(range(size))))
    return [
        str(added[token]).encode() if token in added else b"" if piece is None else read(piece)
        for token, piece in enumerate(pieces)
    ]


def _strips_first_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    strips = [decoder for decoder in _decoders(tokenizer) if decoder["type"] == "Strip"]
    return any(decoder["content"] == " " and decoder["start"] == 1 for decoder in strips)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_letters() -> Iterator[str]:
    """The letter that stands for each byte: itself if it is printable, else one from 256 on.

    Source: openai/gpt-2, ``encoder.py``.
    """
    spare = iter(range(256, 512))
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        yield chr(byte if printable else next(spare))


def _byte_automaton(strings: Sequence[bytes]) -> np.ndarray:
    """int16 [states, 256]. A state is the longest end of the text that begins a string; -1 where one is complete."""
    states = sorted({string[:length] for string in strings for length in range(len(string))}, key=len)
    index = {state: number for number, state in enumerate(states)}
    delta_Ab = np.zeros((len(states), 256), np.int16)
    for number, state in enumerate(states):
        for byte in range(256):
            text = state + bytes([byte])
            ends = (text[start:] for start in range(len(text) + 1))
            delta_Ab[number, byte] = -1 if text.endswith(tuple(strings)) else index[next(e for e in ends if e in index)]
    return delta_Ab


def _run(delta_Ab: np.ndarray, piece: bytes) -> int:
    state = 0
    for byte in piece:
        state = -1 if state < 0 else int(delta_Ab[state, byte])
    return state
