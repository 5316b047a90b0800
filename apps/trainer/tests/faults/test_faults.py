"""What people and machines get wrong, and the sentence they read: one table, run as tests, printed as FAULTS.md.

`python apps/trainer/tests/faults/test_faults.py` writes FAULTS.md anew.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_contracts import ContractError, GrpoError, PolicyVersion
from grpo_loss import TrainState
from grpo_mesh import MeshError
from grpo_sampler import SamplerError, UnsupportedModelError, WeightsError
from grpo_trainer.assemble import assemble
from grpo_trainer.data.prompts import PromptError
from grpo_trainer.data.sources import DataError, read_problems
from grpo_trainer.data.tokenizer import TokenizerError
from grpo_trainer.rewards.functions import RewardError
from grpo_trainer.rewards.workers import RewardWorker
from grpo_trainer.run import checkpoint
from grpo_trainer.run.capsule import CapsuleError, read_capsule
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints, ResumeRefused
from grpo_trainer.run.folder import RunFolder
from grpo_trainer.run.health import Health, StaleWeights
from grpo_trainer.run.progress import Progress
from grpo_trainer.run.state import HealthMemory, LoopState
from grpo_trainer.settings.errors import ConfigError, RunFolderError
from grpo_trainer.settings.schema import Settings
from grpo_trainer.settings.startup import prepare_process

sys.path.append(str(Path(__file__).parents[1]))  # run to write the page, this file has no conftest.py

from toy import TASK, load, settings

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "FAULTS.md"
GOOD = [{"question": f"{n} + 1?", "answer": f"={n + 1}"} for n in range(8)]
VERSIONS = {"grpo-loss": "0.3.1", "jax": "0.10.0"}
IDENTITY = {"parameters": "ab" * 32, "problems": "ef" * 32}


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        area: what is broken.
        broken: in which way.
        error: its exact kind.
        says: parts of the message, in order: they name the culprit.
        make: breaks it and runs into it.
    """

    area: str
    broken: str
    error: type[GrpoError]
    says: tuple[str, ...]
    make: Callable[[Bench], Any]


FAULTS: list[Fault] = []


def fault(area: str, broken: str, error: type[GrpoError], *says: str) -> Callable[[Callable[[Bench], Any]], None]:
    """Add a row."""

    def add(make: Callable[[Bench], Any]) -> None:
        FAULTS.append(Fault(area, broken, error, says, make))

    return add


@dataclass(frozen=True)
class Bench:
    """A place to break things in: a folder, a policy, and patches that are undone."""

    folder: Path
    toy_policy: Path
    patch: pytest.MonkeyPatch

    def data(self, *lines: bytes | str | dict[str, Any], split: str = "train") -> Path:
        """A data set's folder."""
        file = self.folder / "data" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        coded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in coded))
        return file.parent

    def policy(self, *lost: str, **config: Any) -> Path:
        """A copy of the toy policy, without some files and with other entries of its config.json."""
        copy = self.folder / "policy"
        shutil.copytree(self.toy_policy, copy, ignore=shutil.ignore_patterns(*lost))
        if config:
            self.rewrite(copy / "config.json", **config)
        return copy

    def rewrite(self, file: Path, **entries: Any) -> None:
        """Change entries of a JSON file; None removes one."""
        content = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def tensors(self, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
        """A copy of the toy policy with other tensors."""
        copy = self.policy()
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors")
        return copy

    def settings(self, *sets: str) -> Settings:
        """Settings of a small run of the toy policy."""
        return settings(self.toy_policy, self.folder / "run", "reward.functions=[right, digits]", *sets)

    def assemble(self, *sets: str) -> Any:
        """Go as far as a run goes before it samples."""
        return assemble(self.settings(*sets), TASK)

    def run_folder(self, *sets: str) -> RunFolder:
        """The folder of a small run."""
        return RunFolder(self.settings(*sets), VERSIONS)

    def checkpoints(
        self, *steps: int, at: Path | None = None, versions: dict[str, str] = VERSIONS
    ) -> tuple[Checkpoints, TrainState]:
        """Checkpoints of a small state."""
        kept = Checkpoints(at or self.folder / "checkpoints", keep=9, versions=versions)
        for step in steps:
            kept.save(loop(step), IDENTITY, Settings())
            kept.wait()
        return kept, loop(0).train

    @contextlib.contextmanager
    def mounted(self, options: str) -> Iterator[Path]:
        """A file system of its own: a small one, or one that cannot be written."""
        place = self.folder / "mounted"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs Linux and root")
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


def loop(step: int) -> LoopState:
    """The state of a run after this step, with one array and no optimizer."""
    zero = jax.numpy.zeros((), jax.numpy.int32)
    return LoopState(TrainState({"w": jax.numpy.arange(4096.0)}, (), zero, zero + 0), step=step)


# -- settings ------------------------------------------------------------------------------------------------------


@fault("Settings", "an unknown key", ConfigError, "unknown key 'group_sise'", "'rollout.group_size'")
def _(bench: Bench) -> None:
    bench.settings("group_sise=3")


@fault("Settings", "text where a number belongs", ConfigError, "steps must be", "'three'")
def _(bench: Bench) -> None:
    bench.settings("steps=three")


@fault("Settings", "a number out of range", ConfigError, "rollout.top_p must be", "1.5")
def _(bench: Bench) -> None:
    bench.settings("rollout.top_p=1.5")


@fault("Settings", "a key twice in a YAML file", ConfigError, "'steps' is given twice", "line 1")
def _(bench: Bench) -> None:
    (bench.folder / "mine.yaml").write_text("steps: 3\nsteps: 4\n")
    load([str(bench.folder / "mine.yaml")])


@fault(
    "Settings", "a preset that does not exist", ConfigError, "must be a YAML file or a preset", "Did you mean laptop?"
)
def _(bench: Bench) -> None:
    load(["labtop"])


@fault("Settings", "a KL term without a reference", ConfigError, "loss.kl_coefficient", "loss.reference=initial")
def _(bench: Bench) -> None:
    bench.settings("loss.kl_coefficient=0.1")


@fault("Settings", "a reference without a KL term", ConfigError, "loss.reference is 'initial'", "do nothing")
def _(bench: Bench) -> None:
    bench.settings("loss.reference=initial")


@fault("Settings", "groups of one", ConfigError, "rollout.group_size must be at least 2")
def _(bench: Bench) -> None:
    bench.settings("rollout.group_size=1")


@fault("Settings", "greedy sampling", ConfigError, "rollout.temperature must be above 0")
def _(bench: Bench) -> None:
    bench.settings("rollout.temperature=0")


@fault("Settings", "one bound of the clip range alone", ConfigError, "loss.clip_low and loss.clip_high", "None")
def _(bench: Bench) -> None:
    bench.settings("loss.clip_low=0.2")


@fault("Settings", "a bound for a loss that does not clip", ConfigError, "loss.clip_low", "loss.kind=reinforce", "null")
def _(bench: Bench) -> None:
    bench.settings("loss.kind=reinforce", "loss.clip_low=0.2", "loss.clip_high=0.2")


@fault("Settings", "a horizon for a mean", ConfigError, "loss.horizon does nothing", "loss.aggregation=token-mean")
def _(bench: Bench) -> None:
    bench.settings("loss.horizon=100")


@fault("Settings", "a KL without a gradient", ConfigError, "loss.kl=k1", "k2 or k3", "loss.kl_in=reward")
def _(bench: Bench) -> None:
    bench.settings("loss.kl=k1", "loss.kl_coefficient=0.1", "loss.reference=initial")


@fault("Settings", "limits of a correction that is off", ConfigError, "loss.correction_high", "loss.correction=none")
def _(bench: Bench) -> None:
    bench.settings("loss.correction_high=3")


@fault("Settings", "refills of groups that a KL learns from", ConfigError, "rollout.refills", "loss.kl_coefficient=0")
def _(bench: Bench) -> None:
    bench.settings("rollout.refills=2", "loss.kl_coefficient=0.1", "loss.reference=initial")


@fault("Settings", "a penalty on every length", ConfigError, "reward.overlong_buffer", "max_new_tokens=16", "got 99")
def _(bench: Bench) -> None:
    bench.settings("reward.overlong_buffer=99")


@fault(
    "Settings", "an argument of another optimizer", ConfigError, "optimizer.arguments of adamw", "eps", "got momentum"
)
def _(bench: Bench) -> None:
    bench.assemble("optimizer.arguments={momentum: 0.9}")


@fault("Settings", "weight decay for plain Adam", ConfigError, "optimizer.weight_decay is 0.1", "adam has no", "adamw")
def _(bench: Bench) -> None:
    bench.assemble("optimizer.name=adam", "optimizer.weight_decay=0.1")


@fault("Settings", "minibatches that cut groups", ConfigError, "loss.minibatches must divide rollout.prompts", "got 3")
def _(bench: Bench) -> None:
    bench.settings("loss.minibatches=3")


@fault("Settings", "training rows too short for a completion", ConfigError, "loss.row_length", "got 10")
def _(bench: Bench) -> None:
    bench.settings("loss.row_length=10")


@fault("Settings", "a warm-up longer than the run", ConfigError, "optimizer.warmup_steps must be below", "got 99")
def _(bench: Bench) -> None:
    bench.settings("optimizer.warmup_steps=99")


@fault("Settings", "more weights than reward functions", ConfigError, "reward.weights", "got 3 for 2 functions")
def _(bench: Bench) -> None:
    bench.settings("reward.weights=[1, 2, 3]")


@fault("Settings", "a reward function twice", ConfigError, "must not repeat a function", "right")
def _(bench: Bench) -> None:
    bench.settings("reward.functions=[right, right]")


@fault("Settings", "rewards that all weigh nothing", ConfigError, "reward.weights must not all be 0")
def _(bench: Bench) -> None:
    bench.settings("reward.weights=[0, 0]")


@fault("Settings", "CPU devices for a TPU slice", ConfigError, "cpu_devices=2", "slices=[v5e-16]")
def _(bench: Bench) -> None:
    bench.settings("cpu_devices=2", "slices=[v5e-16]")


@fault("Settings", "CPU devices asked for too late", ConfigError, "cpu_devices=3 must be set before jax starts")
def _(bench: Bench) -> None:
    jax.devices()
    bench.patch.delenv("XLA_FLAGS", raising=False)
    prepare_process(bench.settings("cpu_devices=3"))


@fault("Settings", "XLA_FLAGS that contradict cpu_devices", ConfigError, "cpu_devices is 3", "XLA_FLAGS asks for 5")
def _(bench: Bench) -> None:
    bench.patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=5")
    prepare_process(bench.settings("cpu_devices=3"))


@fault("Settings", "a compilation cache that is a file", ConfigError, "compilation_cache must be a writable folder")
def _(bench: Bench) -> None:
    (bench.folder / "cache").touch()
    prepare_process(bench.settings(f"compilation_cache={bench.folder / 'cache'}"))


@fault("Settings", "wandb asked for and not installed", ConfigError, "pip install 'grpo-trainer[wandb]'")
def _(bench: Bench) -> None:
    bench.patch.setitem(sys.modules, "wandb", None)
    with bench.run_folder("log.wandb=true") as folder:
        folder.start(0)


# -- data ----------------------------------------------------------------------------------------------------------


@fault("Data", "a line that is not JSON", DataError, "train.jsonl:2 must be one JSON object a line", "column 1")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(GOOD[0], "question: 3")), "train")


@fault("Data", "a line cut short", DataError, "train.jsonl:2 must be one JSON object a line")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(GOOD[0], '{"question": "7 +')), "train")


@fault("Data", "a line that is a list", DataError, "train.jsonl:1 must be a JSON object", "got list")
def _(bench: Bench) -> None:
    read_problems(str(bench.data("[1, 2]")), "train")


@fault("Data", "a line without an answer", DataError, "train.jsonl:1 must have the field 'answer'", "'question'")
def _(bench: Bench) -> None:
    read_problems(str(bench.data({"question": "3?"})), "train")


@fault("Data", "an answer that is a number", DataError, "train.jsonl:1: answer must be a text", "got 3")
def _(bench: Bench) -> None:
    read_problems(str(bench.data({"question": "3?", "answer": 3})), "train")


@fault("Data", "an empty question", DataError, "train.jsonl:2: question must be a text that is not empty", "' '")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(GOOD[0], {"question": " ", "answer": "=3"})), "train")


@fault("Data", "an empty line", DataError, "train.jsonl:2 must hold a problem: the line is empty")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(GOOD[0], "", GOOD[1])), "train")


@fault("Data", "a question twice", DataError, "train.jsonl:3 must not repeat the question of", "train.jsonl:1")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(GOOD[0], GOOD[1], GOOD[0])), "train")


@fault("Data", "bytes that are not UTF-8", DataError, "train.jsonl:1 must be UTF-8")
def _(bench: Bench) -> None:
    read_problems(str(bench.data(b'{"question": "\xff\xfe", "answer": "3"}')), "train")


@fault("Data", "an empty file (an epoch of nothing)", DataError, "train.jsonl must hold at least one problem")
def _(bench: Bench) -> None:
    read_problems(str(bench.data()), "train")


@fault("Settings", "YAML that builds nothing", ConfigError, "--set steps", "tags (!!name) are not read here")
def _(bench: Bench) -> None:
    bench.settings("steps=!!int abc")


@fault("Settings", "a path with a variable", ConfigError, "data.source must be written out", "'${HOME}'")
def _(bench: Bench) -> None:
    bench.settings("data.source=${HOME}/data")


@fault("Settings", "a run folder with brackets", ConfigError, "run.dir must have no '['", "cannot be read back")
def _(bench: Bench) -> None:
    bench.settings("run.dir=runs/lr[1]")


@fault("Data", "a damaged Parquet file", DataError, "train.parquet must be a Parquet file that is whole")
def _(bench: Bench) -> None:
    (bench.folder / "train.parquet").write_bytes(b"PAR1garbage")
    bench.assemble(f"data.source={bench.folder / 'train.parquet'}")


@fault("Data", "half of a surrogate pair", DataError, "train.jsonl:1: 'question' must be Unicode text")
def _(bench: Bench) -> None:
    bench.assemble(f"data.source={bench.data({'question': 'What ' + chr(0xD800), 'answer': '=1'})}")


@fault("Data", "no test split", DataError, "must hold test.jsonl or test.parquet: it holds train.jsonl")
def _(bench: Bench) -> None:
    bench.assemble(f"data.source={bench.data(*GOOD)}")


@fault("Data", "a source that does not exist", DataError, "a data source must be", "there is no /nowhere/at/all")
def _(bench: Bench) -> None:
    bench.assemble("data.source=/nowhere/at/all")


@fault("Data", "a filter by no column", DataError, "data.filter.column", "got 'levle'", "Did you mean 'level'?")
def _(bench: Bench) -> None:
    leveled = bench.data(*[row | {"level": n} for n, row in enumerate(GOOD)])
    bench.assemble(f"data.source={leveled}", "data.filter={column: levle, min: 1}")


@fault("Data", "a filter that keeps nothing", DataError, "data.filter must keep at least one", "'level' from 99 to inf")
def _(bench: Bench) -> None:
    leveled = bench.data(*[row | {"level": n} for n, row in enumerate(GOOD)])
    bench.assemble(f"data.source={leveled}", "data.filter={column: level, min: 99}")


@fault(
    "Data", "pass rates that were never measured", DataError, "data.filter.pass_rate.records", "there is no /nowhere"
)
def _(bench: Bench) -> None:
    bench.assemble("data.filter.pass_rate={records: /nowhere, max: 0.9}")


@fault(
    "Data",
    "a question longer than data.max_prompt_length",
    DataError,
    "train.jsonl:2: a prompt must have at most",
    "longest has 821",
)
def _(bench: Bench) -> None:
    long = {"question": "1 + " * 200 + "1?", "answer": "=201"}
    bench.assemble(f"data.source={bench.data(GOOD[0], long)}")


# -- model and tokenizer -------------------------------------------------------------------------------------------


@fault("Model", "a folder that does not exist", ConfigError, "model.path must be", "got '/nowhere/policy'")
def _(bench: Bench) -> None:
    bench.assemble("model.path=/nowhere/policy")


@fault("Model", "no config.json", SamplerError, "config.json must exist")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy('config.json')}")


@fault("Model", "a config.json that is not JSON", SamplerError, "config.json must be JSON")
def _(bench: Bench) -> None:
    policy = bench.policy()
    (policy / "config.json").write_text('{"model_type": "qwen2"')
    bench.assemble(f"model.path={policy}")


@fault("Model", "an architecture that is not supported", UnsupportedModelError, "model_type must be one of", "'mamba'")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy(model_type='mamba')}")


@fault("Model", "heads that do not divide", SamplerError, "query_heads must be a multiple of kv_heads", "got 2 and 3")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy(num_key_value_heads=3)}")


@fault("Model", "no weights", WeightsError, "must contain model.safetensors", "got neither")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy('*.safetensors')}")


@fault("Model", "a weight file cut short", WeightsError, "model.safetensors must be a complete safetensors file")
def _(bench: Bench) -> None:
    policy = bench.policy()
    file = policy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    bench.assemble(f"model.path={policy}")


@fault("Model", "a tensor missing", WeightsError, "missing model.layers.0.mlp.up_proj.weight")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.tensors(lambda named: named.pop('model.layers.0.mlp.up_proj.weight'))}")


@fault("Model", "a tensor too many", WeightsError, "must contain only the tensors", "model.layers.7.extra")
def _(bench: Bench) -> None:
    extra = {"model.layers.7.extra": np.zeros(3, np.float32)}
    bench.assemble(f"model.path={bench.tensors(lambda named: named.update(extra))}")


@fault("Model", "a tensor of another shape", WeightsError, "model.norm.weight must have shape (32,): got (31,)")
def _(bench: Bench) -> None:
    other = {"model.norm.weight": np.ones(31, np.float32)}
    bench.assemble(f"model.path={bench.tensors(lambda named: named.update(other))}")


@fault("Model", "a weight that is NaN", WeightsError, "weights must be finite: model.norm.weight holds 32 values")
def _(bench: Bench) -> None:
    other = {"model.norm.weight": np.full(32, np.nan, np.float32)}
    bench.assemble(f"model.path={bench.tensors(lambda named: named.update(other))}")


@fault("Model", "an absurd size", SamplerError, "layers must be at most 1000: got 1000000000")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy(num_hidden_layers=10**9)}")


@fault("Model", "a tensor of integers", WeightsError, "model.norm.weight must be one of", "got I32")
def _(bench: Bench) -> None:
    other = {"model.norm.weight": np.ones(32, np.int32)}
    bench.assemble(f"model.path={bench.tensors(lambda named: named.update(other))}")


@fault("Model", "a tokenizer of a larger vocabulary", ConfigError, "tokens but its model only 64", "do not belong")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy(vocab_size=64)}")


@fault("Model", "no tokenizer", TokenizerError, "must hold a tokenizer, one of tokenizer.json")
def _(bench: Bench) -> None:
    bench.assemble(f"model.path={bench.policy('tokenizer*')}")


@fault("Model", "a damaged tokenizer.json", TokenizerError, "cannot be loaded")
def _(bench: Bench) -> None:
    policy = bench.policy()
    (policy / "tokenizer.json").write_text("{")
    bench.assemble(f"model.path={policy}")


@fault("Model", "a tokenizer without an end token", TokenizerError, "must have an eos_token, which ends a completion")
def _(bench: Bench) -> None:
    policy = bench.policy()
    (policy / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": null}')
    bench.assemble(f"model.path={policy}")


@fault("Model", "a tokenizer without a chat template", PromptError, "no chat template", "set prompt.template")
def _(bench: Bench) -> None:
    policy = bench.policy("chat_template.jinja")
    bench.rewrite(policy / "tokenizer_config.json", chat_template=None)
    bench.assemble(f"model.path={policy}")


@fault("Model", "a reference that vanished", ConfigError, "loss.reference must be", "There is no folder")
def _(bench: Bench) -> None:
    reference = bench.policy()
    sets = (f"loss.reference={reference}", "loss.kl_coefficient=0.1")
    shutil.rmtree(reference)
    bench.assemble(*sets)


@fault("Model", "a reference of another shape", ConfigError, "loss.reference must be", "mlp_width 128 there, 64 here")
def _(bench: Bench) -> None:
    bench.assemble(f"loss.reference={bench.policy(intermediate_size=128)}", "loss.kl_coefficient=0.1")


# -- mesh ----------------------------------------------------------------------------------------------------------


@fault("Mesh", "an axis that does not exist", MeshError, "pp")
def _(bench: Bench) -> None:
    bench.assemble("mesh=dp:1,pp:2")


@fault("Mesh", "sizes that do not make up the devices", MeshError, "1021")
def _(bench: Bench) -> None:
    bench.assemble("mesh=dp:1021")


@fault("Mesh", "a size of zero", MeshError, "tp")
def _(bench: Bench) -> None:
    bench.assemble("mesh=dp:1,tp:0")


# -- rewards -------------------------------------------------------------------------------------------------------


@fault("Rewards", "a module that does not exist", RewardError, "'no_such_module:grade'", "it was not found")
def _(bench: Bench) -> None:
    bench.assemble("reward.functions=[no_such_module:grade]")


@fault("Rewards", "a function that does not exist", RewardError, "'graders:grade'", "has no 'grade'; it has", "moody")
def _(bench: Bench) -> None:
    bench.assemble("reward.functions=[graders:grade]")


@fault("Rewards", "a module that raises", RewardError, "importing its module raised ZeroDivisionError")
def _(bench: Bench) -> None:
    (bench.folder / "own_raising.py").write_text("1 / 0\n")
    bench.patch.chdir(bench.folder)
    bench.assemble("reward.functions=[own_raising:grade]")


@fault("Rewards", "a module that ends its process", RewardError, "'own_ending:grade'", "ended with code 5", "bye")
def _(bench: Bench) -> None:
    (bench.folder / "own_ending.py").write_text("import os\nprint('bye', flush=True)\nos._exit(5)\n")
    bench.patch.chdir(bench.folder)
    RewardWorker("own_ending:grade", timeout=1.0)


@fault("Rewards", "a reward that is no function", RewardError, "'own_number:grade' must be callable: got int")
def _(bench: Bench) -> None:
    (bench.folder / "own_number.py").write_text("grade = 3\n")
    bench.patch.chdir(bench.folder)
    RewardWorker("own_number:grade", timeout=1.0)


# -- run folder ----------------------------------------------------------------------------------------------------


@fault("Run folder", "in use by a live process", RunFolderError, "is in use by a live process")
def _(bench: Bench) -> None:
    with bench.run_folder():
        bench.run_folder()


@fault("Run folder", "a run with other settings", ConfigError, "rollout.group_size: 4 there, 8 now")
def _(bench: Bench) -> None:
    bench.run_folder().close()
    bench.run_folder("rollout.group_size=8")


@fault("Run folder", "a file of that name", RunFolderError, "cannot be written")
def _(bench: Bench) -> None:
    (bench.folder / "run").touch()
    bench.run_folder()


@fault("Run folder", "read-only", RunFolderError, "cannot be written", "Read-only file system", "run.dir")
def _(bench: Bench) -> None:
    with bench.mounted("ro") as place:
        bench.run_folder(f"run.dir={place / 'run'}")


@fault("Run folder", "a full disk", RunFolderError, "No space left", "last checkpoint is intact")
def _(bench: Bench) -> None:
    with bench.mounted("size=64k") as place, bench.run_folder(f"run.dir={place / 'run'}") as folder:
        folder.start(0)
        folder.completions(1, [{"completion": "x" * 100_000}])


@fault("Run folder", "a link in place of the lock", RunFolderError, "lock must be a plain file")
def _(bench: Bench) -> None:
    bench.run_folder().close()
    (bench.folder / "run" / "lock").unlink()
    (bench.folder / "run" / "lock").symlink_to(bench.folder / "mine")
    bench.run_folder()


@fault("Run folder", "a pipe in place of the lock", RunFolderError, "lock must be a plain file")
def _(bench: Bench) -> None:
    bench.run_folder().close()
    (bench.folder / "run" / "lock").unlink()
    os.mkfifo(bench.folder / "run" / "lock")
    bench.run_folder()


@fault("Run folder", "damaged settings", RunFolderError, "config.yaml is not the settings of a run")
def _(bench: Bench) -> None:
    bench.run_folder().close()
    (bench.folder / "run" / "config.yaml").write_text("steps: [\n")
    bench.run_folder()


# -- checkpoints ---------------------------------------------------------------------------------------------------


@fault(
    "Checkpoint",
    "of another policy",
    ResumeRefused,
    "step 3",
    "parameters: checkpoint 'abab",
    "this run 'cdcd",
    "no setting allows this",
)
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(3)
    kept.restore(state, {"parameters": "cd" * 32})


@fault(
    "Checkpoint",
    "of other problems",
    ResumeRefused,
    "step 3",
    "problems: checkpoint 'efef",
    "this run 'cdcd",
    "checkpoint.any_data=true",
)
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(3)
    kept.restore(state, {**IDENTITY, "problems": "cd" * 32})


@fault(
    "Checkpoint", "of incompatible libraries", ResumeRefused, "grpo-loss: checkpoint 0.0.1, here", "any_version=true"
)
def _(bench: Bench) -> None:
    kept, _ = bench.checkpoints(3, versions={**VERSIONS, "grpo-loss": "0.0.1"})
    kept.close()
    kept, state = bench.checkpoints()
    kept.restore(state, IDENTITY)


@fault("Checkpoint", "of another format", ResumeRefused, "has format 0; this program reads 2")
def _(bench: Bench) -> None:
    with bench.patch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 0)
        kept, state = bench.checkpoints(3)
    kept.restore(state, IDENTITY)


@fault("Checkpoint", "a flipped bit in each", CheckpointError, "every checkpoint", "damaged (steps 1, 2)")
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(1, 2)
    for step in (1, 2):
        _spoil(bench.folder / "checkpoints" / f"step_{step}", lambda data: bytes([data[0] ^ 1]) + data[1:])
    kept.restore(state, IDENTITY)


@fault("Checkpoint", "each cut short", CheckpointError, "every checkpoint", "damaged (steps 1, 2)")
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(1, 2)
    for step in (1, 2):
        _spoil(bench.folder / "checkpoints" / f"step_{step}", lambda data: data[: len(data) // 2])
    kept.restore(state, IDENTITY)


@fault("Checkpoint", "the arrays alone cut short", CheckpointError, "every checkpoint", "damaged (steps 1)")
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(1)
    files = [file for file in (bench.folder / "checkpoints" / "step_1" / "state").rglob("d/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    kept.restore(state, IDENTITY)


@fault("Checkpoint", "notes that were edited", CheckpointError, "every checkpoint", "damaged (steps 1)")
def _(bench: Bench) -> None:
    kept, state = bench.checkpoints(1)
    for file in (bench.folder / "checkpoints" / "step_1" / "notes").rglob("*"):
        if file.is_file() and b"abab" in (data := file.read_bytes()):
            file.write_bytes(data.replace(b"abab", b"abac", 1))
    kept.restore(state, IDENTITY)


@fault(
    "Checkpoint", "a full disk while it is written", CheckpointError, "No space left on device", "Earlier checkpoints"
)
def _(bench: Bench) -> None:
    with bench.mounted("size=1m") as place:
        kept, state = bench.checkpoints(1, at=place / "kept")
        filler = place / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        try:
            kept.save(loop(2), IDENTITY, Settings())
            kept.wait()
        finally:
            restored = Checkpoints(place / "kept", keep=9, versions=VERSIONS).restore(state, IDENTITY)
            assert restored is not None, "nothing may be lost"
            assert restored.step == 1


# -- the run -------------------------------------------------------------------------------------------------------


@fault("Run", "completions of stale weights", StaleWeights, "step 4 with digest cdcd", "step 3 with digest abab")
def _(bench: Bench) -> None:
    rollout: Any = type("Rollout", (), {"policy": PolicyVersion(3, "ab" * 32)})
    with bench.run_folder() as folder:
        health = Health(bench.settings(), folder, Progress(4), HealthMemory())
        health.check_rollout(rollout, PolicyVersion(4, "cd" * 32))


@fault("Run", "a capsule cut short", CapsuleError, "capsule.zip must be a capsule, written by a run")
def _(bench: Bench) -> None:
    (bench.folder / "capsule.zip").write_bytes(b"PK\x03\x04 and no more")
    read_capsule(bench.folder / "capsule.zip")


def _spoil(checkpoint_folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change every file of the arrays."""
    for file in (checkpoint_folder / "state").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(change(file.read_bytes()))


# -- signals and kills: in processes of their own ------------------------------------------------------------------

_STAGES = "rollout, reward, update, evaluation, while a checkpoint is written or read"
_SAME = "the same command resumes the run; every step once; samples, metrics, parameters, optimizer state bit for bit"

# What happens, how the run continues, and the test that lets it happen.
KILLS = [
    (
        f"SIGKILL at any instant of {_STAGES}",
        _SAME,
        "apps/trainer/tests/test_kills.py::test_killed_at_random_instants",
    ),
    (
        "the same to either or both of two processes",
        _SAME,
        "apps/trainer/tests/test_kills.py::test_killed_at_random_instants",
    ),
    (
        "SIGTERM or SIGINT",
        f"the step is finished and saved, exit 75; {_SAME}",
        "apps/trainer/tests/test_kills.py::test_a_signal_saves_and_the_same_command_goes_on",
    ),
    (
        "a second signal, even to a process that hangs",
        "exit 128 + its number, at once",
        "libs/grpo-mesh/tests/test_preemption.py::test_a_second_signal_ends_a_process_that_is_stuck",
    ),
    (
        "a second start of a run that is alive",
        "refused; the first one is not disturbed",
        "apps/trainer/tests/test_kills.py::test_a_second_run_in_the_same_folder_is_refused",
    ),
    (
        "a damaged checkpoint, under two processes",
        "named; both resume from the one before",
        "apps/trainer/tests/test_kills.py::test_two_processes_step_over_a_damaged_checkpoint",
    ),
    (
        "fewer or more devices or processes than before",
        "resumes: same problems and samples, numbers up to the order of float sums",
        "apps/trainer/tests/test_kills.py::test_a_run_goes_on_on_other_devices",
    ),
    (
        "a trainer killed while it waits for a reward",
        "its reward processes end with it, and everything they started",
        "apps/trainer/tests/test_reward_workers.py::test_no_orphan_outlives_a_killed_trainer",
    ),
    (
        "SIGKILL, a crash, a second signal or SIGHUP to `grpo_mesh.launch`",
        "its processes end with it, and everything they started",
        "libs/grpo-mesh/tests/test_launch.py::test_no_process_outlives_the_launcher",
    ),
    (
        "SIGTERM while a run is built",
        "exit 75, at once",
        "apps/trainer/tests/test_cli.py::test_a_signal_while_a_run_is_built_ends_it_as_one_that_can_go_on",
    ),
    (
        "nobody reads the output any more, as after `\\| head -1`",
        "exit 141 without a word; the same command resumes the run",
        "apps/trainer/tests/test_cli.py::test_output_that_nobody_reads_ends_a_command_quietly",
    ),
    (
        "a reward function leaves a process behind that holds its pipes",
        "the process is killed; the step continues",
        "apps/trainer/tests/test_reward_workers.py::test_what_a_function_started_dies_with_it_and_delays_nobody",
    ),
    (
        "SIGKILL between the summary and the report",
        "the same command writes the report",
        "apps/trainer/tests/test_train.py::test_a_run_that_was_killed_at_its_end_leaves_all_of_it",
    ),
    (
        "metrics.jsonl or completions.jsonl cut, gone or damaged",
        "said; the lost steps are named in the summary and the report",
        "apps/trainer/tests/test_run_folder.py::test_records_that_a_checkpoint_covers_and_a_file_does_not_are_named",
    ),
    (
        "checkpoints gone while metrics are there",
        "said; the steps are done again, the old records kept in `damaged/`",
        "apps/trainer/tests/test_train.py::test_a_run_without_its_checkpoints_starts_again_and_says_so",
    ),
    (
        "a damaged summary.json",
        "said, and written anew",
        "apps/trainer/tests/test_run_folder.py::test_a_damaged_summary_is_named_and_written_anew",
    ),
]


# -- the table as tests and as a page ------------------------------------------------------------------------------

_compiled: list[str] = []


def _note_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: f"{row.area}: {row.broken}")
def test_the_error_is_the_right_one(
    row: Fault, tmp_path: Path, toy_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiled.clear()
    with pytest.raises(row.error) as caught:
        row.make(Bench(tmp_path, toy_policy, monkeypatch))
    assert type(caught.value) is row.error
    message = str(caught.value)
    at = 0
    for part in row.says:
        at = message.find(part, at)
        assert at >= 0, f"{part!r} is not in (the rest of) the message: {message}"
    if row.area not in ("Checkpoint", "Run"):
        assert not _compiled, "a fault of the input must be found before anything is compiled"


def test_the_table_is_large_and_has_no_row_twice() -> None:
    assert len(FAULTS) >= 40
    assert len({(row.area, row.broken) for row in FAULTS}) == len(FAULTS)
    assert not any(issubclass(row.error, ContractError) for row in FAULTS)  # those are ours to mend


def test_every_kill_of_the_page_has_its_test() -> None:
    for *_, address in KILLS:
        file, _, name = address.partition("::")
        assert f"def {name}(" in (TESTS.parents[2] / file).read_text(encoding="utf-8"), address


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"run: python {os.path.relpath(__file__)}"


def page() -> str:
    """FAULTS.md."""
    head = inspect.cleandoc(
        f"""
        # Faults and their messages

        {len(FAULTS)} ways in which a run cannot work, each with the error it ends in and what its message names, and
        {len(KILLS)} in which it is interrupted. Made from the tests' tables by
        `python apps/trainer/tests/faults/test_faults.py`; a test keeps it up to date. Faults of settings, data, model,
        mesh and rewards are found before anything is compiled; none costs a checkpoint.
        """
    )
    lines = [head]
    for area in dict.fromkeys(row.area for row in FAULTS):
        lines += [f"\n## {area}\n", "| What is broken | Error | Its message names |", "| --- | --- | --- |"]
        for row in FAULTS:
            if row.area == area:
                says = " … ".join(part.replace("|", "\\|") for part in row.says)
                lines.append(f"| {row.broken} | `{row.error.__name__}` | {says} |")
    lines += ["\n## Signals and kills\n", "| What happens | How the run continues | Test |", "| --- | --- | --- |"]
    lines += [f"| {what} | {how} | `{address}` |" for what, how, address in KILLS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
