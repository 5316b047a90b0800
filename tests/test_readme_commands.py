"""Every command in every README is run here, made small, or listed with the reason why it is not.

What a hatch environment would run is read from pyproject.toml; it runs in this environment.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tools/BENCHMARKS.md")),
    *sorted(ROOT.glob("libs/*/README.md")),
    *sorted(ROOT.glob("apps/*/README.md")),
]
COMMAND = re.compile(r"(?:\w+=\S+ )?(?:hatch run|pip|python) \S")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]


@dataclass(frozen=True)
class Small:
    """How a command is run here.

    Args:
        more: further arguments, which make it small.
        swaps: what stands for the page's placeholders.
        needs: modules that only some environments have.
        slow: it compiles programs or starts processes.
    """

    more: str = ""
    swaps: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    slow: bool = False


SETTINGS = Small("--print-config")  # as far as it goes without a TPU, a hub or hours
HELP = Small("--help")
BUILT = Small("--dry-run --set cpu_devices=0", slow=True)
TRAINED = (
    "--set cpu_devices=0 steps=1 run.dir=runs/{} rollout.prompts=2 rollout.group_size=2 loss.rows=2 eval.problems=2 "
    "rollout.max_new_tokens=8 log.tensorboard=false"
)
MEASURED = "--set cpu_devices=0 eval.problems=2"
OWN_FILES = {"PATH_OR_HUB_ID": "policy", "data.source=policy": "data.source=data"}
BENCHMARK = Small("--help", needs=("psutil",))

RUN: dict[str, Small] = {
    # -- the apps
    "hatch run apps/gsm8k:train": Small(TRAINED.format("NAME"), slow=True),
    "hatch run apps/gsm8k:train --config qwen2.5-0.5b --set model.path=PATH_OR_HUB_ID data.source=PATH_OR_HUB_ID": Small(  # noqa: E501
        "rollout.max_new_tokens=64 --dry-run", OWN_FILES, slow=True
    ),
    "hatch run apps/gsm8k:train --set 'reward.functions=[my_rewards:short_and_right]'": BUILT,
    "hatch run apps/gsm8k:train --config qwen2.5-0.5b": SETTINGS,
    "hatch run apps/gsm8k:train --config smollm2-135m": SETTINGS,
    "hatch run apps/gsm8k:train --config smollm2-135m --set model.lora.rank=16 model.lora.alpha=32 optimizer.learning_rate=2e-4": SETTINGS,  # noqa: E501
    "hatch run apps/gsm8k:train --config NAME_OR_PATH --set KEY=VALUE ...": Small(
        "--print-config", {"NAME_OR_PATH": "laptop", "KEY=VALUE": "steps=3", " ...": ""}
    ),
    "hatch run apps/gsm8k:train --print-config": Small(),
    "hatch run apps/gsm8k:train --dry-run": BUILT,
    "hatch run apps/gsm8k:train --set steps=6 eval.every=3": SETTINGS,
    "hatch run apps/gsm8k:train --set seed=SEED": Small("--print-config", {"SEED": "1"}),
    "hatch run apps/gsm8k:train --set model.lora.rank=8 model.lora.alpha=16 optimizer.learning_rate=3e-3 seed=SEED": Small(  # noqa: E501
        "--print-config", {"SEED": "1"}
    ),
    "PYTHONPATH=tools hatch run apps/gsm8k:train --set 'reward.functions=[shuffled_reward:shuffled]'": BUILT,
    "hatch run apps/gsm8k:eval RUN_OR_MODEL ...": Small(MEASURED, {"RUN_OR_MODEL ...": "runs/NAME policy"}, slow=True),
    "hatch run apps/gsm8k:eval models/smollm2-135m-instruct EXPORT --config smollm2-135m --set eval.problems=500": SETTINGS,  # noqa: E501
    "hatch run apps/gsm8k:eval --checkpoint runs/NAME": Small(MEASURED, slow=True),
    "hatch run apps/gsm8k:eval runs/A runs/B/checkpoints/step_40 FOLDER": Small(
        MEASURED, {"step_40": "step_1", "FOLDER": "policy"}, slow=True
    ),
    "hatch run apps/gsm8k:eval FOLDER --split train --set eval.samples=8": Small(
        f"{MEASURED} data.train_size=2 prompt.instruction= rollout.max_new_tokens=8 rollout.prompts=2 loss.rows=2",
        {"FOLDER": "policy", "samples=8": "samples=2"},
        slow=True,
    ),
    "hatch run apps/gsm8k:report RUN RUN ...": Small(swaps={"RUN RUN ...": "runs/A runs/B"}, slow=True),
    "hatch run apps/gsm8k:report runs/A runs/B": Small(slow=True),
    "hatch run apps/gsm8k:export RUN FOLDER": Small(swaps={"RUN": "runs/A", "FOLDER": "exported"}, slow=True),
    "hatch run apps/gsm8k:export runs/NAME FOLDER": Small(swaps={"FOLDER": "exported-too"}, slow=True),
    "hatch run apps/gsm8k:replay CAPSULE": HELP,
    "hatch run apps/gsm8k:warmstart": HELP,
    "hatch run apps/gsm8k:make-data FOLDER": Small(swaps={"FOLDER": "made"}),
    "hatch run apps/gsm8k:make-tokenizer FOLDER": Small(swaps={"FOLDER": "made"}),
    "hatch run apps/countdown:train": Small(TRAINED.format("COUNTDOWN"), slow=True),
    "hatch run apps/countdown:train --print-config": Small(),
    "hatch run apps/countdown:train --set model.path=PATH_OR_HUB_ID data.source=FILE.jsonl": Small(
        "--dry-run --set cpu_devices=0 data.max_prompt_length=300", {"PATH_OR_HUB_ID": "policy"}, slow=True
    ),
    "hatch run apps/countdown:eval --checkpoint runs/NAME": Small(MEASURED, {"runs/NAME": "runs/COUNTDOWN"}, slow=True),
    "hatch run apps/countdown:warmstart": HELP,
    # -- preflight: the compiler's own part is in the environment tpu-test
    "hatch run apps/gsm8k:preflight": SETTINGS,
    "hatch run apps/gsm8k:preflight --config qwen2.5-7b": SETTINGS,
    "hatch run apps/gsm8k:preflight --config qwen2.5-7b --slice v5e-16": SETTINGS,
    "hatch run apps/gsm8k:preflight --config qwen2.5-7b --slice v6e-16 --search": SETTINGS,
    "hatch run apps/gsm8k:preflight --config PRESET --slice SLICE": Small(
        "--print-config", {"PRESET": "qwen2.5-1.5b", "SLICE": "v5e-4"}
    ),
    "hatch run apps/gsm8k:preflight --config PRESET --slice SLICE --search --quick --set loss.chunk=2048": Small(
        "--print-config", {"PRESET": "qwen2.5-1.5b", "SLICE": "v5e-4"}
    ),
    "hatch run apps/gsm8k:preflight --config qwen2.5-7b --slice v5e-256 --set rollout.prompts=64 loss.rows=64": SETTINGS,  # noqa: E501
    "hatch run tpu:memory --config qwen2.5-3b --lengths 2048 8192 32256 --set mesh=dp:1,fsdp:-1,tp:1 loss.chunk=0": HELP,  # noqa: E501
    "hatch run tpu:train": SETTINGS,
    "hatch run tpu:train --config qwen2.5-7b": SETTINGS,
    # -- the libraries
    "python -m grpo_contracts schema": Small(),
    "python -m grpo_contracts check FILE": Small(swaps={"FILE": "batch.npz"}),
    "python -m grpo_mesh.launch --processes 2 --devices-per-process 2 -- python train.py": Small(slow=True),
    "python -m grpo_mesh.render jobset|gcloud|slurm launch.toml": Small(swaps={"jobset|gcloud|slurm": "jobset"}),
    # -- tools
    "hatch run models:fetch": HELP,
    "hatch run models:fetch smollm2-135m-instruct": HELP,
    "hatch run models:second-opinion FOLDER RECORDS": HELP,
    "hatch run bench:rollout": BENCHMARK,
    "hatch run bench:rollout --tunix PYTHON --transformers PYTHON": BENCHMARK,
    "hatch run bench:update --tunix PYTHON": BENCHMARK,
    "hatch run bench:step --tunix PYTHON": BENCHMARK,
    "hatch run bench:real --torch PYTHON --questions GSM8K/test.jsonl --repeats 1": Small("--help"),
    "hatch run bench:real --only padding": Small("--help"),
    "hatch run bench:padding --presets --steps 20": HELP,
    "hatch run bench:padding --data GSM8K --tokenizer models/smollm2-135m-instruct/tokenizer.json --sizes 1 5 7": HELP,
    "hatch run bench:long-run --steps 2000 --out runs/long": BENCHMARK,
    "hatch run bench:fuzz": Small("--help", slow=True),
    "hatch run bench:soak --minutes 120": Small("--help", needs=("psutil",), slow=True),
    "hatch run release:check": Small(),
    "hatch run release:bump grpo-loss minor": HELP,
    "hatch run release:compat": HELP,
    "hatch run release:build": HELP,
}
INDEX = "installs from a package index"
NOT_RUN: dict[str, str] = {
    "pip install hatch": INDEX,
    "pip install grpo-loss": INDEX,
    "pip install grpo-mesh": INDEX,
    "pip install grpo-sampler": INDEX,
    "pip install 'grpo-gsm8k[math]'": INDEX,
    "pip install -e apps/doubling": "apps/countdown/tests/test_readme.py writes that app and builds a run of it",
    "python -m grpo_doubling.task train": "the same",
    "hatch run apps/doubling:app train": "the same",
    "python tests/audit_estimators.py": "minutes; libs/grpo-loss/tests tests its parts",
    "hatch run test": "these tests",
    "hatch run test-all": "these tests",
    "hatch run test-newest": "these tests",
    "hatch run libs/grpo-loss:test": "these tests",
    "hatch run check:all": "rewrites no file and is run by .ci/run",
    "hatch run oracles:test": "needs PyTorch and the peers",
    "hatch run tpu-test:test": "needs the TPU compiler",
}


def commands(page: Path) -> Iterator[str]:
    """What a page tells to type: lines of blocks without a language, and code within sentences."""
    text = page.read_text()
    lines = [line for language, block in BLOCK.findall(text) if not language for line in block.splitlines()]
    sentences = BLOCK.sub("", text)
    for written in [*lines, *re.findall(r"`([^`\n]+)`", sentences)]:
        if COMMAND.match(written):
            without_comment = re.sub(r"\s+# .*$", "", written).strip()
            yield re.sub(r'"\$\(hatch run \w+:which python\)"', "PYTHON", without_comment)


FOUND = sorted({command for page in PAGES for command in commands(page)})


def test_every_command_is_known() -> None:
    unknown = [command for command in FOUND if command not in RUN | NOT_RUN]
    assert not unknown, "run them in RUN, or say in NOT_RUN why not"
    gone = [command for command in RUN | NOT_RUN if command not in FOUND]
    assert not gone, "no page has these any more"


def script_of(environment: str, name: str) -> str | None:
    """A script of a hatch environment, or of what it inherits from; None for any other program."""
    entry: dict[str, Any] = ENVIRONMENTS[environment]
    scripts = entry.get("scripts", {})
    if name in scripts or environment == "default":
        return scripts.get(name)
    return script_of(entry.get("template", "default"), name)


def words_of(environment: str, name: str, more: list[str]) -> list[str]:
    """What hatch runs for a script and further arguments."""
    script = script_of(environment, name)
    if script is None:
        return [name, *more]
    first, *rest = shlex.split(script.replace("{args}", ""))
    return words_of(environment, first, [*rest, *more])


def expanded(words: list[str]) -> list[str]:
    """The words of a command, with hatch's part done."""
    while words[:2] == ["hatch", "run"]:
        environment, _, name = words[2].rpartition(":")
        words = words_of(environment or "default", name, words[3:])
    return words


def run(command: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command in the working directory; an app's in this process, which has imported what it needs."""
    small = RUN.get(command, Small())
    for placeholder, ours in small.swaps.items():
        assert placeholder in command
        command = command.replace(placeholder, ours)
    words = [*shlex.split(command), *small.more.split()]
    if words[0].startswith("PYTHONPATH="):
        patch.syspath_prepend(ROOT / words.pop(0).partition("=")[2])
    program, *words = expanded(words)
    assert program == "python"
    if words[0] == "-m" and words[1] in ("grpo_gsm8k.cli", "grpo_countdown.cli"):
        try:
            code = import_module(words[1]).main(words[2:])
        except SystemExit as done:  # --help
            code = done.code
        assert code == 0
        return
    own = words[0].startswith("tools/") or words[1].startswith("tools.")
    done = subprocess.run([sys.executable, *words], cwd=ROOT if own else None, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages' placeholders stand for."""
    from grpo_gsm8k.task import TASK

    folder = tmp_path_factory.mktemp("readers")
    readme, contracts = ((ROOT / name / "README.md").read_text() for name in (".", "libs/grpo-contracts"))
    (reward,) = (block for _, block in BLOCK.findall(readme) if block.startswith("# my_rewards.py"))
    batch = BLOCK.findall(contracts)[0][1].replace("[0, 0.5]", "[0, 0]")  # there, it shows what is refused
    (folder / "my_rewards.py").write_text(reward)
    (folder / "train.py").write_text("import grpo_mesh\nprint(grpo_mesh.initialize())\n")
    launch = 'name = "grpo"\ncommand = ["python", "train.py"]\nslice = "v5e-16"\nimage = "registry/grpo:1"\n'
    (folder / "launch.toml").write_text(launch)
    (folder / "FILE.jsonl").write_text('{"question": "Reach 8 from 9, 7, 6.", "answer": "9-7+6"}\n')
    shutil.copytree(TASK.policies["embedded"], folder / "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(batch, "README.md", "exec"), {})  # writes batch.npz
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> None:
    """Runs of both apps, and the problems as files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in ("hatch run apps/gsm8k:make-data data", *TRAININGS):
            run(command, patch)
    for name in ("A", "B"):
        shutil.copytree(place / "runs/NAME", place / "runs" / name)


TRAININGS = ("hatch run apps/gsm8k:train", "hatch run apps/countdown:train")


def try_out(command: str, place: Path, patch: pytest.MonkeyPatch) -> None:
    for module in RUN[command].needs:
        pytest.importorskip(module)
    patch.chdir(place)
    patch.syspath_prepend(str(place))
    run(command, patch)


@pytest.mark.parametrize("command", [command for command in RUN if not RUN[command].slow])
def test_a_light_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_out(command, place, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("command", [command for command in RUN if RUN[command].slow and command not in TRAININGS])
def test_a_heavy_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_out(command, place, monkeypatch)
