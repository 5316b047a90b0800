"""Mutation fuzzing of everything that a run reads: settings, data, model folders, run folders, batches, templates.

    hatch run bench:fuzz --cases 20000
    hatch run bench:fuzz settings --cases 100 --seed 7

Each case damages a good input and reads it. It may be accepted, or refused with a `GrpoError`; anything else that is
raised, more than ten seconds, or more than a gigabyte of memory above what the program began with is a fault. Prints
the counts and seconds of each target and every fault with the number that makes it again; ends with 1 if there is one.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_contracts import (
    GrpoError,
    PolicyVersion,
    Rollout,
    SamplingParams,
    Scored,
    TrainBatch,
    load_batch,
    save_batch,
)
from grpo_gsm8k.task import TASK
from grpo_sampler import ModelConfig, abstract, load_pretrained, save_pretrained
from grpo_trainer.data.prompts import PromptStyle, encode_prompts
from grpo_trainer.data.sources import read_problems
from grpo_trainer.data.tokenizer import load_tokenizer
from grpo_trainer.run.files import read_lines, read_summary
from grpo_trainer.settings.layers import dump, flat, load, load_saved

LONGEST_SECONDS, MOST_BYTES = 10, 2**30
Case = Callable[[random.Random], Any]

# What people and machines put where something else belongs.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 10**400, -(10**30), 0.5, 1e300, float("nan"), float("inf"), -0.0,
    "", " ", "a", "\0", "\ud800", "ünï", "a" * 5000, "../x", "~nobody/x", "${HOME}", "1", "null", "{question}", "{{",
    [], {}, [None], [[]], ["a", 1], {"a": 1}, {"": None}, [1] * 1000,
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"a" * 70000,
    b"&a ", b"*a", b"!!int ", b"!!python/object:x ", b"<<: ", b"- ", b"? ", b"| ", b"#", b"---\n", b"%TAG ! x\n",
    b"{{ ", b"{% ", b"%}", b" }}",
)  # fmt: skip


def damaged(good: bytes, rng: random.Random) -> bytes:
    """The bytes with a few changes: flipped, cut out, cut off, doubled, or with a token put in."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(data) + 1), min(int(rng.expovariate(0.1)) + 1, 4096)
        match rng.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + size]
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[at : at + size] * rng.choice((1, 1, 200))
            case 4:
                data[at : at + size] = rng.randbytes(size)
            case _:
                data[at:at] = rng.choice(TOKENS)
    return bytes(data)


def replaced(tree: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced, removed or doubled."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        name = rng.choice(list(tree))
        if rng.random() < 0.1:
            return {key: value for key, value in tree.items() if key != name}
        return {**tree, name: replaced(tree[name], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        at = rng.randrange(len(tree))
        return [*tree[:at], replaced(tree[at], rng), *tree[at + 1 :]]
    return rng.choice(VALUES)


def json_damaged(good: bytes, rng: random.Random) -> bytes:
    """A JSON text that is damaged as a value or as bytes."""
    if rng.random() < 0.3:
        return damaged(good, rng)
    return json.dumps(replaced(json.loads(good), rng)).encode()


# -- targets ---------------------------------------------------------------------------------------------------------


def settings_target(folder: Path) -> Case:
    """Assignments on the command line, and YAML files."""
    defaults = load(TASK)
    good, keys, file = dump(defaults).encode(), list(flat(defaults)), folder / "mine.yaml"

    def value(rng: random.Random) -> str:
        chosen = rng.choice(VALUES)
        text = json.dumps(chosen) if rng.random() < 0.5 or isinstance(chosen, int) else str(chosen)
        if rng.random() < 0.7:
            return text
        return damaged(text.encode(errors="surrogatepass"), rng).decode(errors="replace")

    def case(rng: random.Random) -> Any:
        if rng.random() < 0.5:
            key = rng.choice(keys)
            if rng.random() < 0.1:
                key = damaged(key.encode(), rng).decode(errors="surrogateescape")
            return dump(load(TASK, (), [f"{key}={value(rng)}"]))
        lines = good.splitlines(keepends=True)
        some = b"".join(rng.sample(lines, rng.randrange(1, 12)))
        file.write_bytes(damaged(some if rng.random() < 0.7 else good, rng))
        return dump(load(TASK, [str(file)]) if rng.random() < 0.5 else load_saved(file))

    return case


def data_target(folder: Path) -> Case:
    """JSONL and Parquet files of problems."""
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}", "more": {"level": [n, None]}} for n in range(6)]
    lines = [json.dumps(row).encode() for row in rows]
    parquet = folder / "good.parquet"
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), parquet)
    good = parquet.read_bytes()

    def case(rng: random.Random) -> Any:
        if rng.random() < 0.3:
            (folder / "x.parquet").write_bytes(damaged(good, rng))
            return read_problems(str(folder / "x.parquet"), "train")
        at = rng.randrange(len(lines))
        (folder / "x.jsonl").write_bytes(
            b"\n".join([*lines[:at], json_damaged(lines[at], rng), *lines[at + 1 :]]) + b"\n"
        )
        return TASK.problems(str(folder / "x.jsonl"), "train", rng.choice((0, 3)))

    return case


def model_target(folder: Path) -> Case:
    """config.json, weights and index of a model folder, and generation_config.json and tokenizers with them."""
    config = ModelConfig("qwen2", 31, 8, 12, 2, 2, 1, 4, qkv_bias=True, tied=True)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract(config)[1])
    save_pretrained(folder / "one", config, params)
    save_pretrained(folder / "many", config, params, max_shard_bytes=1500)
    index = (folder / "many/model.safetensors.index.json").read_bytes()
    good, weights = (folder / "one/config.json").read_bytes(), (folder / "one/model.safetensors").read_bytes()

    def case(rng: random.Random) -> Any:
        match rng.randrange(4):
            case 0 | 1:
                (folder / "one/config.json").write_bytes(json_damaged(good, rng))
                read = ModelConfig.from_file(folder / "one")
                if read == config or rng.random() < 0.1:
                    return load_pretrained(folder / "one")
                return read
            case 2:
                (folder / "one/config.json").write_bytes(good)
                (folder / "one/model.safetensors").write_bytes(damaged(weights, rng))
                try:
                    return load_pretrained(folder / "one")
                finally:
                    (folder / "one/model.safetensors").write_bytes(weights)
            case _:
                (folder / "many/model.safetensors.index.json").write_bytes(json_damaged(index, rng))
                return load_pretrained(folder / "many")

    return case


def tokenizer_target(folder: Path) -> Case:
    """Files of a tokenizer, chat templates and the other ways to put a question."""
    source = TASK.policies["embedded"]
    names = ("tokenizer.json", "tokenizer_config.json")
    good = {name: (source / name).read_bytes() for name in names}
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = load_tokenizer(source)
    template = str(whole.chat_template)
    problem = TASK.problems("embedded", "test", 1)

    def case(rng: random.Random) -> Any:
        if rng.random() < 0.05:  # a tokenizer takes long to load
            for name in names:
                (folder / name).write_bytes(json_damaged(good[name], rng) if rng.random() < 0.6 else good[name])
            return encode_prompts(problem, load_tokenizer(folder), PromptStyle())
        text = damaged(template.encode(), rng).decode(errors="replace")
        whole.chat_template = text
        style = PromptStyle(
            system=rng.choice(("", "Think.")),
            template=rng.choice(("", "", "Q: {prompt}", "{{prompt}}", "x", "\0{prompt}")),
            instruction=rng.choice(("", "{question}", "{question} {x}", "Now.")),
            arguments=rng.choice(({}, {"date_string": None}, {"a b": 1}, {"messages": 1}, {"enable_thinking": False})),
        )
        return encode_prompts(problem, whole, style)

    return case


def run_target(folder: Path) -> Case:
    """What a run left behind and reads back."""
    line = json.dumps({"step": 3, "time": 1.5, "reward": 0.25, "eval/accuracy": None}).encode()
    summary = json.dumps({"steps": 3, "accuracy_before": 0.5, "accuracy_before_interval": [0.1, 0.9]}).encode()
    settings = dump(load(TASK)).encode()

    def case(rng: random.Random) -> Any:
        match rng.randrange(3):
            case 0:
                (folder / "metrics.jsonl").write_bytes(b"\n".join([line, json_damaged(line, rng), line, b""]))
                return read_lines(folder / "metrics.jsonl")
            case 1:
                (folder / "summary.json").write_bytes(json_damaged(summary, rng))
                return read_summary(folder)
            case _:
                (folder / "config.yaml").write_bytes(damaged(settings, rng))
                return load_saved(folder / "config.yaml")

    return case


def batch_target(folder: Path) -> Case:
    """Batch files: bytes of the zip, the JSON header, and the headers of arrays."""
    import zipfile

    save_batch(a_batch(), folder / "good.npz")
    good = (folder / "good.npz").read_bytes()
    with zipfile.ZipFile(folder / "good.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def case(rng: random.Random) -> Any:
        file = folder / "x.npz"
        if rng.random() < 0.3:
            file.write_bytes(damaged(good, rng))
        else:
            name = rng.choice(list(members)) if rng.random() < 0.5 else "header.json"
            change = json_damaged if name == "header.json" else damaged
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for member, content in (members | {name: change(members[name], rng)}).items():
                    archive.writestr(member, content)
        return load_batch(file)

    return case


def a_batch() -> TrainBatch:
    """Two groups of two completions of one token."""
    ids = np.arange(4, dtype=np.int32)
    tokens_BT = np.tile(np.array([[5, 6]], np.int32), (4, 1))
    drawn_BT = np.tile(np.array([[False, True]]), (4, 1))
    logp_BT = np.where(drawn_BT, np.float32(-1), np.float32(0))
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=np.ones(4, np.int32),
        total_length_B=np.full(4, 2, np.int32),
        loss_mask_BT=drawn_BT,
        logp_BT=logp_BT,
        policy_logp_BT=logp_BT,
        finish_B=np.zeros(4, np.int8),
        prompt_id_B=ids // 2,
        sample_B=ids % 2,
        group_B=ids // 2,
        group_size=2,
        sampling=SamplingParams(stop_ids=(6,)),
        policy=PolicyVersion(0, ""),
        vocab_size=9,
        pad_id=0,
    )
    scored = Scored.from_rewards(rollout, {"right": [1.0, 0.0, None, 1.0]})
    return TrainBatch(scored, np.zeros(4, np.float32))


TARGETS: dict[str, Callable[[Path], Case]] = {
    "settings": settings_target,
    "data": data_target,
    "model": model_target,
    "tokenizer": tokenizer_target,
    "run": run_target,
    "batch": batch_target,
}


# -- running them ----------------------------------------------------------------------------------------------------


class Hang(Exception):
    """A case took too long."""


def fuzz(name: str, cases: int, seed: int, *, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Run cases of one target.

    Args:
        name: of the target.
        cases: how many.
        seed: with a case's number it decides the case.
        first: number of the first case.

    Returns:
        How many were accepted and refused, and the faults.
    """
    counts: Counter[str] = Counter()
    faults: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="grpo-fuzz-"))
    try:
        case = TARGETS[name](folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in range(first, first + cases):
            signal.alarm(LONGEST_SECONDS)
            try:
                case(random.Random(f"{name} {seed} {number}"))
                counts["accepted"] += 1
            except GrpoError:
                counts["refused"] += 1
            except Exception:  # noqa: BLE001 - whatever escapes is what is looked for
                faults.append(f"{name}, seed {seed}, case {number}: {traceback.format_exc(limit=-4)[-3000:]}")
            finally:
                signal.alarm(0)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if grown > MOST_BYTES:
                faults.append(f"{name}, seed {seed}, case {number}: memory grew by {grown / 2**30:.1f} GiB")
                break
    finally:
        shutil.rmtree(folder)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to make a fault again")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")

    def hang(*_: Any) -> None:
        raise Hang(f"more than {LONGEST_SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    found = 0
    for name in given.targets or TARGETS:
        started = time.monotonic()
        counts, faults = fuzz(name, given.cases, given.seed, first=given.first)
        found += len(faults)
        for text in faults[:20]:
            print(text)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        total, seconds = sum(counts.values()) + len(faults), time.monotonic() - started
        print(
            f"{name:10} {total:7,} cases: {counts['accepted']:,} accepted, {counts['refused']:,} refused, "
            f"{len(faults)} faults, {seconds:.0f} s, peak {peak:.2f} GiB",
            flush=True,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
