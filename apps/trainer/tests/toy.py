"""A task that exists only in these tests: sums of two digits, answered after `=`. `python toy.py train` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_trainer import cli
from grpo_trainer.settings import layers
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Judgement, Problem, Split

if TYPE_CHECKING:
    from grpo_contracts import RewardFunction

_ANSWER = re.compile(r"=\s*(\d+)")


def right(*, completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the number after `=` is the answer; unscored where the data set's own answer has none."""
    rows = zip(completions, answers)
    return [None if _read(gold) is None else float(_read(text) == _read(gold)) for text, gold in rows]


def digits(*, completions: Sequence[str], **_: Any) -> list[float | None]:
    """The share of digits: a reward that a random policy already gets now and then."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def sevens(*, completions: Sequence[str], **_: Any) -> list[float | None]:
    """1 where there is a 7: so seldom that in most groups of a random policy all rewards are equal."""
    return [float("7" in text) for text in completions]


class Sums:
    """Sums of two digits."""

    name = "toy"
    title = "GRPO on sums of two digits."
    instruction = ""
    folder = Path(__file__).parent / "toy_app"
    policies: Mapping[str, Path] = {}
    rewards: Mapping[str, RewardFunction] = {"right": right, "digits": digits, "sevens": sevens}
    weights: Mapping[str, float] = {"right": 1.0, "digits": 0.5}

    def problems(self, source: str, split: Split, limit: int) -> Sequence[Problem]:
        """`embedded`: sums, those of the two splits apart; or a file of one's own."""
        if source != "embedded":
            from grpo_trainer.data.sources import read_problems

            return read_problems(source, split, limit=limit)
        sums = [(a, b) for a in range(10) for b in range(10) if ((a + b) % 4 == 0) == (split == "test")]
        return [
            Problem(f"{a} + {b}?", f"={a + b}", f"embedded {split}:{number}")
            for number, (a, b) in enumerate(sums[: limit or None], 1)
        ]

    def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
        """Right is the number after `=`; formed is nothing besides."""
        read = _read(completion)
        is_right = read == _read(problem.answer)
        formed = finished and _ANSWER.fullmatch(completion) is not None
        return Judgement(strict=is_right, lenient=is_right, formed=formed, read="" if read is None else f"={read}")


def _read(text: str) -> int | None:
    found = _ANSWER.search(text)
    return int(found[1]) if found else None


TASK = Sums()
load = partial(layers.load, TASK)


def settings(policy: Path, folder: Path, *more: str) -> Settings:
    """Of a small run, seconds long, that checks nothing unless asked to.

    Args:
        policy: folder of the policy.
        folder: of the run.
        more: assignments as of `--set`; they win.
    """
    quiet = ("steps=2", "data.train_size=40", "eval.before=false", "eval.after=false", "eval.every=0")
    once = ("checkpoint.every=0", "reward.functions=[digits]")
    return load([], [f"model.path={policy}", f"run.dir={folder}", *quiet, *once, *more])


PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> int:
    """Write a tokenizer of bytes, with ChatML's turns; return the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, TURN, END, *(f"<|reserved_{n}|>" for n in range(5))]  # 264: it divides over devices
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),  # the bytes, and nothing merged
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["7 + 4?"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def make_policy(folder: Path, **entries: Any) -> Path:
    """A policy of random weights in Hugging Face layout; `entries` are further ones of its config.json."""
    from flax import nnx

    from grpo_sampler import ModelConfig, Transformer, save_pretrained, split

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": make_tokenizer(folder),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config | entries))
    model = ModelConfig.from_file(folder)
    save_pretrained(folder, model, split(Transformer(model, rngs=nnx.Rngs(0)))[1])
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock wrote, and what else a process counts for itself."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time", "seconds", "compiled")
    return [{k: v for k, v in line.items() if not k.startswith(own) and "per_second" not in k} for line in lines]


if __name__ == "__main__":
    cli.run_app(TASK)
