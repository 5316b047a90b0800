"""Settings: layers, strictness, and messages that name the key."""

from contextlib import suppress
from functools import reduce
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import load

from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.layers import changed_keys, dump, flat, load_saved
from grpo_trainer.settings.schema import LossSettings, RolloutSettings, Settings


def refused(*sets: str, configs: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(configs, sets)
    return str(caught.value)


def written(tmp_path, text: str) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", ["laptop", "large"])
def test_presets_survive_a_round_trip(name, tmp_path):
    config = load([name])
    file = written(tmp_path, dump(config))
    assert load([file]) == config
    assert load_saved(Path(file)) == config


def test_saved_settings_need_no_task(tmp_path):
    """What a run saved is whole: neither presets nor the task's rewards are laid under it, and no key may be new."""
    config = load(["large"], ["reward.functions=[right]", "reward.weights=[0.25]", "optimizer.arguments={eps: 1e-6}"])
    file = Path(written(tmp_path, dump(config)))
    assert load_saved(file) == config
    assert load_saved(Path(written(tmp_path, "steps: 7\n"))) == Settings(steps=7)
    file.write_text(dump(config) + "stepps: 3\n")
    with pytest.raises(ConfigError, match="unknown key 'stepps'"):
        load_saved(file)


def test_laptop_is_the_default():
    assert load(["laptop"]) == load()
    assert load().rollout.prompts == 4
    assert Settings().rollout.prompts == 32  # beneath the task's defaults lie the trainer's


def test_the_tasks_rewards_are_the_default():
    assert load().reward.functions == ("right", "digits")
    assert load().reward.weights == (1.0, 0.5)


def test_later_layers_win(tmp_path):
    file = written(tmp_path, "steps: 7\nrollout:\n  prompts: 4\n  group_size: 3\n")
    config = load([file], ["rollout.group_size=5", "rollout.group_size=6"])
    assert (config.steps, config.rollout.prompts, config.rollout.group_size) == (7, 4, 6)
    assert changed_keys(load([file]), config) == {"rollout.group_size": (3, 6)}


def test_yaml_files_compose(tmp_path):
    config = load(["large", written(tmp_path, "steps: 700\n")])
    assert (config.steps, config.slices) == (700, ("v5e-16", "v6e-16"))


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".001", "0.001"])
def test_numbers_need_no_dot(text, tmp_path):
    # YAML 1.1 reads 1e-3 as text.
    assert load([], [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-3
    assert load([written(tmp_path, f"optimizer:\n  learning_rate: {text}\n")]).optimizer.learning_rate == 1e-3


def test_whole_numbers_are_numbers_but_text_is_not():
    assert load([], ["loss.kl_coefficient=1", "loss.reference=initial"]).loss.kl_coefficient == 1.0
    assert "loss.kl_coefficient must be a number >= 0" in refused("loss.kl_coefficient='1'")


@pytest.mark.parametrize("value", ["1,-1,1", "8", "dp:1,fsdp:-1", "'1,-1,1'"])
def test_text_on_the_command_line_needs_no_quotes(value):
    assert load([], [f"mesh={value}"]).mesh == value.strip("'")


def test_a_folder_called_like_a_date_is_text(tmp_path):
    assert load([], ["run.dir=2026-11-23"]).run.dir == "2026-11-23"
    assert load([written(tmp_path, "run:\n  dir: 2026-11-23\n")]).run.dir == "2026-11-23"


def test_lists():
    config = load([], ["reward.functions=[my_module:my_reward, right]", "reward.weights=[1, 0.5]"])
    assert config.reward.functions == ("my_module:my_reward", "right")
    assert config.reward.weights == (1.0, 0.5)


def test_one_function_of_ones_own_needs_no_weights():
    config = load(["laptop"], ["reward.functions=[my_module:my_reward]"])
    assert config.reward.weights == (1.0,)
    assert load([], ["reward.functions=[right, digits]"]).reward.weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.group_sise", "rollout.group_size"),
        ("group_size", "rollout.group_size"),
        ("sampler.group_size", "rollout.group_size"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("loss.kl_coef", "loss.kl_coefficient"),
        ("sed", "seed"),
    ],
)
def test_unknown_key(key, nearest, tmp_path):
    message = refused(f"{key}=1")
    assert repr(key) in message
    assert repr(nearest) in message
    assert "which takes" in message
    section, _, leaf = key.rpartition(".")
    text = f"{section}:\n  {leaf}: 1\n" if section else f"{leaf}: 1\n"
    in_file = refused(configs=(written(tmp_path, text),))
    assert repr(key) in in_file
    assert "mine.yaml" in in_file


@pytest.mark.parametrize("key", ["optimizer.ema", "loss.lora_rank", "rollout.stopwatch", "wholly.elsewhere"])
def test_an_unknown_key_that_resembles_none_gets_no_guess(key):
    message = refused(f"{key}=1")
    assert f"unknown key {key!r}" in message
    assert "nearest" not in message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("!!int abc", "tags"),
        ("!!timestamp abc", "tags"),
        ("!!python/object:os.system x", "tags"),
        ("9" * 5000, "a number has at most"),
        ("1." + "0" * 5000, "a number has at most"),
        ("[" * 20_000, "levels deep"),
        ("{a: " * 5_000, "levels deep"),
        ("- " * 5_000 + "1", "levels deep"),
        ("&a [1]", "steps must be a whole number"),
        ("[&a 1, *a]", "aliases"),
        ("\x07", "not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_built(value, says, tmp_path):
    message = refused(f"steps={value}")
    assert says in message
    assert "steps" in message
    assert len(message) < 1000
    in_file = refused(configs=(written(tmp_path, f"steps: {value}\n"),))
    assert "mine.yaml" in in_file or "steps must be" in in_file


@pytest.mark.parametrize("key", ["run.dir", "data.source", "prompt.examples_file", "model.path", "compilation_cache"])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("${HOME}/runs", "got '${HOME}'"),
        ("a/$USER", "got '$USER'"),
        ("~nobody-of-this-name/a", "home directory"),
        ("a" * 5000, "255"),
        ("a/" * 3000, "4096 bytes"),
        ("a\0b", "null character"),
    ],
)
def test_paths_that_no_file_can_have(key, path, says):
    message = refused(f"{key}={path}")
    assert message.startswith(f"{key} must")
    assert says in message
    assert len(message) < 600


@pytest.mark.parametrize("name", ["run[1]", "lr=1e-6,bs=[8]", "back\\slash"])
def test_a_run_folder_whose_checkpoints_could_not_be_read_back(name):
    assert "Checkpoints written there cannot be read back" in refused(f"run.dir=runs/{name}")
    assert load([], ["run.dir=/elsewhere/run{x} ü*?"]).run.dir == "/elsewhere/run{x} ü*?"


def test_a_settings_file_that_no_file_can_be(tmp_path):
    assert "255" in refused(configs=("a" * 5000,))
    assert "written out" in refused(configs=("$HOME/mine.yaml",))
    assert "must be a YAML file" in refused(configs=(str(tmp_path),))
    assert "must be at most" in refused(configs=(written(tmp_path, "# " + "x" * 1_000_000),))


def test_a_file_called_tilde_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "steps: 7\n")
    assert load(["~/mine.yaml"]).steps == 7


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=abc", "steps must be a whole number >= 1"),
        ("steps=0", "steps must be a whole number >= 1"),
        ("steps=1e3", "steps must be a whole number >= 1"),
        ("seed=true", "seed must be a whole number >= 0"),
        ("seed=-1", "seed must be a whole number >= 0"),
        ("model.remat=yes", "model.remat must be true or false"),
        ("model.remat=1", "model.remat must be true or false"),
        ("rollout.top_p=1.5", "rollout.top_p must be a number > 0 and <= 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a number > 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate must be a number > 0"),
        ("optimizer.learning_rate=", "got nothing"),
        ("optimizer.schedule=cosin", "Did you mean cosine?"),
        ("loss.kind=sapoo", "Did you mean sapo?"),
        ("loss.sapo_positive=0", "loss.sapo_positive must be a number or null > 0"),
        ("loss.top_entropy=1", "loss.top_entropy must be a number or null > 0 and < 1"),
        ("loss.clip_advantage=0", "loss.clip_advantage must be a number or null > 0"),
        ("loss.horizon=-1", "loss.horizon must be a whole number >= 0"),
        ("loss.kl=k4", "loss.kl must be one of k1, k2, k3"),
        ("loss.kl_in=los", "Did you mean loss?"),
        ("loss.correction=mask", "loss.correction must be one of none, truncate, drop"),
        ("loss.correction_low=1.5", "loss.correction_low must be a number or null >= 0 and <= 1"),
        ("loss.correction_high=0.5", "loss.correction_high must be a number or null >= 1"),
        ("loss.drop_truncated=1", "loss.drop_truncated must be true or false"),
        ("rollout.refills=-1", "rollout.refills must be a whole number >= 0"),
        ("reward.overlong_buffer=-1", "reward.overlong_buffer must be a whole number >= 0"),
        ("reward.overlong_penalty=0", "reward.overlong_penalty must be a number > 0"),
        ("optimizer.name=adamx", "Did you mean adam"),
        ("optimizer.arguments=3", "optimizer.arguments must be a mapping of names to values"),
        ("optimizer.arguments={eps: small}", "optimizer.arguments must be a mapping of names to values"),
        ("optimizer.decay=norms", "optimizer.decay must be one of all, matrices"),
        ("optimizer.end_learning_rate=-1", "optimizer.end_learning_rate must be a number >= 0"),
        ("slices=[v7-1]", "v5e-16"),
        ("slices=v5e-16", "slices must be a list of names like v4-8"),
        ("run.dir=", "run.dir must be non-empty text"),
        ("reward.functions=right", "reward.functions must be a list"),
        ("reward.functions=[1]", "reward.functions must be a list"),
        ("reward.functions=[rigth]", "`right`, `digits`, `sevens` or module:function"),
        ("reward.functions=[right, right]", "must not repeat"),
        ("reward.weights=[1, 2, 3]", "reward.weights must have one number for each of reward.functions"),
        ("reward.weights=[0, 0]", "reward.weights must not all be 0"),
        ("data.filter.values=3", "data.filter.values must be a list, each of it text or a number or true or false"),
        ("data.filter.pass_rate.max=2", "data.filter.pass_rate.max must be a number >= 0 and <= 1"),
        ("data.filter.pass_rate.record=a", "'data.filter.pass_rate.records'"),
        ("eval.problems=0", "eval.problems must be a whole number >= 1"),
        ("rollout=3", "'rollout' is a section"),
        ("rollout={prompts: 4, promts: 4}", "'rollout.promts'"),
        ("rollout", "--set must look like key=value"),
        ("=3", "--set must look like key=value"),
        ("loss.epochs=[1", "not valid YAML"),
        ("loss.epochs=*a", "aliases"),
        ("steps=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_wrong_values(assignment, expected):
    assert expected in refused(assignment)


KL = ["loss.kl_coefficient=0.1", "loss.reference=initial"]


@pytest.mark.parametrize(
    ("sets", "keys"),
    [
        (["loss.kl_coefficient=0.1"], ["loss.kl_coefficient", "loss.reference"]),
        (["loss.reference=initial"], ["loss.kl_coefficient", "loss.reference"]),
        (["rollout.group_size=1"], ["rollout.group_size", "loss.advantage"]),
        (["loss.clip_low=0.2"], ["loss.clip_low", "loss.clip_high"]),
        (["loss.clip_low=0.2", "loss.clip_high=0.2", "loss.kind=sapo"], ["loss.clip_low", "loss.kind"]),
        (["loss.dual_clip=3", "loss.kind=gspo"], ["loss.dual_clip", "loss.kind"]),
        (["rollout.temperature=0"], ["rollout.temperature"]),
        (["rollout.top_k=1"], ["rollout.top_k"]),
        (["loss.minibatches=3"], ["loss.minibatches", "rollout.prompts"]),
        (["loss.row_length=10"], ["loss.row_length", "rollout.max_new_tokens"]),
        (["loss.sizes=3", "loss.prompt_sizes=2"], ["loss.sizes=3", "loss.prompt_sizes=1"]),
        (["loss.row_length=70"], ["loss.row_length", "loss.blocks", "rows of 72 tokens"]),
        (["optimizer.warmup_steps=60", "steps=60"], ["optimizer.warmup_steps", "60 optimizer updates"]),
        (["cpu_devices=2", "slices=[v5e-1]"], ["cpu_devices", "slices"]),
        (["loss.clip_low=0.2", "loss.clip_high=0.2", "loss.kind=reinforce"], ["loss.clip_low", "loss.kind=reinforce"]),
        (["loss.sapo_positive=2"], ["loss.sapo_positive", "loss.kind=ppo"]),
        (["loss.sapo_negative=2", "loss.kind=gspo"], ["loss.sapo_negative", "loss.kind=gspo"]),
        (["loss.horizon=100"], ["loss.horizon", "loss.aggregation=token-mean"]),
        ([*KL, "loss.kl=k1"], ["loss.kl=k1", "loss.kl_in=reward"]),
        (["loss.kl_ratio=true"], ["loss.kl_ratio", "loss.kl_coefficient"]),
        ([*KL, "loss.kl_ratio=true", "loss.kl_in=reward"], ["loss.kl_ratio", "loss.kl_in=loss"]),
        (["loss.kl_in=reward"], ["loss.kl_in=reward", "loss.kl_coefficient"]),
        ([*KL, "loss.kl_in=reward", "loss.advantage=gdpo"], ["loss.advantage=gdpo", "loss.kl_in=loss"]),
        (["loss.correction_level=token"], ["loss.correction_level", "loss.correction=none"]),
        (["loss.correction_low=0.1"], ["loss.correction_low", "loss.correction=none"]),
        (["loss.correction_high=3"], ["loss.correction_high", "loss.correction=none"]),
        (
            ["loss.correction=drop", "loss.correction_low=1", "loss.correction_high=1"],
            ["loss.correction_low", "loss.correction_high", "got 1 and 1"],
        ),
        (["reward.overlong_buffer=17"], ["reward.overlong_buffer", "rollout.max_new_tokens=16", "got 17"]),
        ([*KL, "rollout.refills=1"], ["rollout.refills", "loss.kl_coefficient=0"]),
        (["data.filter.min=1"], ["data.filter.min does nothing", "set data.filter.column"]),
        (["data.filter.values=[hard]"], ["data.filter.values does nothing", "set data.filter.column"]),
        (["data.filter.column=level"], ["data.filter.column keeps every problem", "data.filter.values"]),
        (["data.filter={column: level, max: 1, values: [1]}"], ["data.filter.values", "data.filter.max"]),
        (["data.filter={column: level, min: 3, max: 2}"], ["data.filter.min", "data.filter.max", "got 3 and 2"]),
        (["data.filter.pass_rate.min=0.1"], ["data.filter.pass_rate.min", "set data.filter.pass_rate.records"]),
        (["data.filter.pass_rate.records=a"], ["data.filter.pass_rate keeps every", "min and max"]),
        (["data.filter.pass_rate={records: a, min: 0.5, max: 0.2}"], ["data.filter.pass_rate.max", "0.5 and 0.2"]),
        (["optimizer.decay=matrices"], ["optimizer.decay", "optimizer.weight_decay"]),
        (["optimizer.end_learning_rate=1e-5"], ["optimizer.end_learning_rate", "optimizer.schedule"]),
    ],
)
def test_contradictions_name_their_keys(sets, keys):
    message = refused(*sets)
    for key in keys:
        assert key in message


def test_all_problems_are_said_at_once():
    message = refused("rollout.temperature=0", "loss.kl_coefficient=0.1")
    assert "rollout.temperature" in message
    assert "loss.reference" in message


def test_every_misspelt_key_of_every_layer_is_said_at_once(tmp_path):
    config = written(tmp_path, "rollout: {promts: 3}\n")
    message = refused("loss.kl_coef=0.1", "steps", "optimizer.lr=1e-6", configs=(config,))
    for part in ("rollout.promts", "loss.kl_coef", "--set must look like key=value", "optimizer.lr"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3\nsteps: 4\n", "key 'steps' is given twice (first on line 1)"),
        ("rollout:\n  prompts: 3\n  prompts: 4\n", "line 3"),
        ("rollout.prompts: 4\n", "must be written nested, `rollout: {prompts: ...}`"),
        ("- 3\n", "must hold keys and values"),
        ("steps: [\n", "not valid YAML"),
        ("? [a]\n: 3\n", "must be text"),
        ("1: 3\n", "must be text"),
        ("steps: &a 3\nseed: *a\n", "aliases"),
        ("steps: !!python/name:os.system\n", "not valid YAML"),
        ("steps: 3\n---\nsteps: 4\n", "not valid YAML"),
        ("rollout: 3\n", "'rollout' is a section"),
    ],
)
def test_bad_yaml(text, expected, tmp_path):
    assert expected in refused(configs=(written(tmp_path, text),))


def test_empty_files_and_sections_change_nothing(tmp_path):
    assert load([written(tmp_path, "# nothing\n")]) == load()
    assert load([written(tmp_path, "rollout:\n  # prompts: 3\n")]) == load()


def test_unreadable_files(tmp_path):
    assert "Did you mean large?" in refused(configs=("Large",))
    assert "laptop" in refused(configs=(str(tmp_path),))
    (tmp_path / "latin.yaml").write_bytes(b"steps: \xff\n")
    assert "cannot be read" in refused(configs=(str(tmp_path / "latin.yaml"),))


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().steps = 3  # type: ignore[misc]


def test_every_key_says_what_it_is():
    for name in flat(Settings()):
        *sections, leaf = name.split(".")
        model = type(reduce(getattr, sections, Settings()))
        assert model.model_fields[leaf].description, name


@given(
    prompts=st.integers(1, 10**6),
    temperature=st.floats(min_value=1e-6, max_value=10),
    low=st.floats(min_value=1e-6, max_value=0.99),
    folder=st.text(
        st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="[]\\$~"), min_size=1, max_size=20
    ),
)
def test_what_is_dumped_reads_back(prompts, temperature, low, folder, tmp_path_factory):
    config = Settings(
        rollout=RolloutSettings(prompts=prompts, temperature=temperature),
        loss=LossSettings(clip_low=low, clip_high=2 * low),
        run={"dir": folder},  # type: ignore[arg-type]
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load_saved(file) == config


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_assignment_raises_anything_but_a_config_error(key, value):
    for name in (key, "steps", "reward.functions", "rollout"):
        with suppress(ConfigError):
            load([], [f"{name}={value}"])


@pytest.mark.parametrize(
    ("text", "value"), [("", ""), ("''", ""), ("null", ""), ("Be brief: {question}", "Be brief: {question}")]
)
def test_text_that_may_be_null_needs_no_quotes(text: str, value: str) -> None:
    """The toy task asks for nothing, so null comes to nothing too."""
    assert load([], [f"prompt.instruction={text}"]).prompt.instruction == value
