"""Preflight: its arithmetic, its verdicts, its messages; and a small run compiled for a slice that is not there."""

import dataclasses
import importlib.util
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from grpo_trainer.assemble.placement import RULES

from grpo_gsm8k import cli
from grpo_loss._token_logp import _default_chunk
from grpo_mesh import CompileReport, MeshError, compile_with_text, find_slice, make_mesh, parse_mesh, shardings
from grpo_sampler import abstract
from grpo_trainer.assemble.blueprint import blueprint, model_config
from grpo_trainer.assemble.preflight.command import preflight
from grpo_trainer.assemble.preflight.local import TOLERANCE, Comparison
from grpo_trainer.assemble.preflight.programs import Measured
from grpo_trainer.assemble.preflight.search import Candidate, candidates
from grpo_trainer.assemble.preflight.verdict import EFFICIENCY, GIB, Phase, judge, table
from grpo_trainer.assemble.preflight.work import Splash, Work, head_chunks, work_of
from runs import assemble
from grpo_trainer.settings.errors import ConfigError
from runs import load
from grpo_trainer.settings.layers import preset_names

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler comes with libtpu, which is not installed"
)
PRESETS = [name for name in preset_names() if name != "laptop"]


def report(peak_gib: float, temporaries_gib: float = 1.0) -> CompileReport:
    rest = int((peak_gib - temporaries_gib) * GIB)
    return CompileReport(rest, 0, 0, int(temporaries_gib * GIB), 0, 0.0, 0.0, {}, {}, 0)


def program(name: str, phase: str, peak_gib: float, *, work: Work | None = None, beside_gib: float = 0) -> Measured:
    return Measured(name, phase, int(beside_gib * GIB), 2.0, report(peak_gib), 0, work or Work())


@pytest.fixture(scope="module")
def plan():
    config = load(["qwen2.5-0.5b"])
    return blueprint(config, model_config(config.model.path), make_mesh("auto", jax.devices()[:1]))


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_shipped_dimensions_give_the_published_number_of_parameters(path, parameters):
    _, shapes = abstract(model_config(path))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_dimensions_of_another_hub_id_are_asked_for():
    with pytest.raises(ConfigError, match=r"qwen2\.5-7b.*got model\.path='meta/Llama'.*config\.json into a folder"):
        model_config("meta/Llama")


def test_a_folder_needs_no_weights(toy_policy):
    assert model_config(str(toy_policy)).layers == 1


@pytest.mark.parametrize("vocabulary", [48, 512, 32_000, 151_936, 152_064, 500_000])
@pytest.mark.parametrize("tokens", [1, 128, 500, 512, 513, 1024, 2048, 5000, 16_384])
def test_the_head_is_counted_in_the_chunks_that_it_is_computed_in(tokens, vocabulary):
    assert head_chunks(tokens, vocabulary) == math.ceil(tokens / _default_chunk(tokens, vocabulary))


def test_the_blueprint_is_what_a_run_assembles(toy_policy):
    settings = [f"model.path={toy_policy}", "data.train_size=40", "eval.problems=4", "rollout.max_new_tokens=16"]
    config = load([], [*settings, "loss.epochs=2", "mesh=dp:1,fsdp:1,tp:1"])
    run = assemble(config)
    plan = blueprint(config, model_config(config.model.path), run.mesh)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), (plan.state))
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), run.state)
    assert plan.pack_shape == run.pack_shape
    for name in ("config", "slots", "sizes", "max_prompt_length", "max_new_tokens", "min_new_tokens"):
        assert getattr(plan.sampler, name) == getattr(run.sampler, name)


def test_two_nested_loops_are_counted_at_their_own_number_of_turns():
    width = 32

    def nested(turns, x):
        def outer(_, x):
            return jax.lax.fori_loop(0, turns[1], lambda _, x: x @ x, x @ x @ x)

        return jax.lax.fori_loop(0, turns[0], outer, x @ x)

    shapes = [jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((width, width), jnp.float32)]
    compiled, text = compile_with_text(jax.jit(nested).lower(*shapes).compile)
    _, work = work_of(compiled, text, trips=(5, 7))
    assert work.flops == 2 * width**3 * (1 + 5 * (2 + 7))


def test_the_splash_kernel_is_counted_in_its_own_tiles():
    splash = Splash(rows=4, heads=14, head_size=64, length=511)
    assert splash.flops("splash_mha_fwd_segmented_no_residuals") == 2 * 2 * 4 * 14 * 64 * 512**2 / 2
    assert splash.flops("another_kernel") == 0


def test_work_adds_up():
    one = Work(1.0, 10.0, {"all-gather": (1, 8.0)})
    both = one + Work(2.0, 5.0, {"all-reduce": (2, 4.0)}).times(3)
    assert (both.flops, both.traffic, both.network) == (7.0, 25.0, 20.0)
    assert both.collectives == {"all-gather": (1, 8.0), "all-reduce": (6, 12.0)}


def test_a_phase_is_bound_by_the_slowest_and_expected_at_stated_efficiencies():
    phase = Phase("update", Work(), compute=1.0, memory=3.0, network=2.0)
    assert (phase.bound, phase.limit) == (3.0, "memory")
    assert phase.expected == pytest.approx(3.0 / EFFICIENCY["memory"] + 2.0 / EFFICIENCY["network"])


def test_what_stays_beside_a_program_counts(plan):
    target = find_slice("v5e-1")
    fits = judge(plan, [program("decode", "rollout", 15.0)], target)
    assert fits.fits
    assert fits.advice() == []
    full = judge(plan, [program("decode", "rollout", 15.0, beside_gib=1.0)], target)
    assert not full.fits
    assert full.fullest.name == "decode"


def test_a_run_that_fits_says_so_with_its_step(plan):
    chip = find_slice("v5e-1").chip
    work = Work(chip.flops, chip.hbm_bandwidth, {"all-gather": (3, chip.ici_bandwidth)})
    verdict = judge(plan, [program("update", "update", 12.0, work=work)], find_slice("v5e-1"))
    text = table(verdict)
    assert verdict.seconds == pytest.approx(1 / EFFICIENCY["compute"] + 1 / EFFICIENCY["network"])
    assert "fits v5e-1: peak 12.00 GiB of 15.75 GiB a device, during update" in text
    assert f"{16 * 8 * 1024 / verdict.seconds:,.0f} tokens/s" in text
    assert "all-gather" in text


def test_a_run_that_does_not_fit_says_what_to_change(plan):
    text = table(judge(plan, [program("update", "update", 17.0)], find_slice("v5e-1")))
    assert "DOES NOT FIT v5e-1" in text
    assert "change loss.rows=1: smaller micro-batches" in text
    assert "change --slice v5e-4: parameters and optimizer take 5.52 GiB of a device here, and 1.25 GiB" in text
    assert "remat" not in text  # on already
    assert "row_length" not in text  # as short as its completions already
    loss = plan.config.loss.model_copy(update={"row_length": 0})
    wide = dataclasses.replace(plan, config=plan.config.model_copy(update={"loss": loss}))
    text = table(judge(wide, [program("update", "update", 17.0)], find_slice("v5e-1")))
    assert f"change loss.row_length={plan.config.rollout.max_new_tokens}: shorter rows" in text
    text = table(judge(plan, [program("decode", "rollout", 20.0)], find_slice("v5e-4")))
    assert "change rollout.slots=64" in text
    assert "change mesh=dp:1,fsdp:-1,tp:2" in text


def test_a_program_that_the_compiler_refuses_does_not_fit(plan):
    refused = replace(program("update", "update", 1.0), report=None, refused=20 * GIB)
    verdict = judge(plan, [refused], find_slice("v5e-1"))
    assert not verdict.fits
    assert verdict.peak == 20 * GIB
    assert "refused" in table(verdict)


@pytest.mark.parametrize(("name", "slice_name"), [(name, each) for name in PRESETS for each in load([name]).slices])
def test_every_preset_divides_on_its_slices(name, slice_name):
    config = load([name])
    chips = find_slice(slice_name).chips
    model = model_config(config.model.path)
    sizes = parse_mesh(config.mesh, chips)
    assert model.kv_heads % sizes["tp"] == 0
    assert config.loss.rows % (sizes["dp"] * sizes["fsdp"]) == 0


def test_candidates_divide():
    config = load(["qwen2.5-7b"])
    model = model_config(config.model.path)
    found = list(candidates(config, model, 16))
    assert {candidate.tp for candidate in found} == {1, 2, 4}  # four key/value heads
    assert found[0] == Candidate(1, 16, 1, 16)
    for candidate in found:
        assert candidate.dp * candidate.fsdp * candidate.tp == 16
        assert candidate.rows % (candidate.dp * candidate.fsdp) == 0
        assert candidate.apply(config).mesh == candidate.mesh


def test_tp_that_does_not_divide_the_heads_is_refused():
    _, shapes = abstract(model_config("Qwen/Qwen2.5-0.5B"))
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("dp", "fsdp", "tp"))
    with pytest.raises(MeshError, match=r"layers/k.*must divide by tp = 4"):
        shardings(shapes, mesh, RULES)


def test_a_comparison_tells_its_error():
    assert str(Comparison("update", 110 * 2**20, 100 * 2**20)).endswith("error +10.0%")


def test_search_needs_a_slice():
    with pytest.raises(ConfigError, match="needs a slice"):
        preflight(load([]), search=True)


def test_an_unknown_slice_is_refused_on_the_command_line(capsys):
    assert cli.main(["preflight", "--config", "qwen2.5-7b", "--slice", "v5e-3"]) == 2
    assert "choose one of v5e-1, v5e-4" in capsys.readouterr().err


@pytest.mark.slow
def test_the_update_s_predicted_memory_is_near_what_is_measured_on_this_machine(capsys):
    preflight(load([], ["cpu_devices=0", "mesh=dp:1"]))
    printed = capsys.readouterr().out
    error = re.search(r"^update .*error ([+-][\d.]+)%$", printed, re.MULTILINE)
    assert error
    assert abs(float(error[1])) / 100 <= TOLERANCE
    assert "rollout   predicted" in printed


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("slice_name", ["v5e-4", "v6e-1", "v4-8", "v5p-8"])
def test_a_small_run_is_compiled_for_a_slice(slice_name, toy_policy, capsys):
    sets = [
        f"model.path={toy_policy}",
        "cpu_devices=0",
        f"slices=[{slice_name}]",
        "model.compute_dtype=bfloat16",
        "model.remat=true",
    ]
    config = load([], [*sets, "data.max_prompt_length=64", "rollout.max_new_tokens=64", "rollout.prompts=8"])
    assert preflight(config) == 0
    printed = capsys.readouterr().out
    assert "TPU_SKIP_MDS_QUERY=1" in printed
    assert "attention splash in training" in printed
    assert f"fits {slice_name}" in printed
    # Read off the compiled programs. Not in the rollout: of a prompt's last layer only keys and values are needed, and
    # this policy has no other.
    for phase, kernel in (("update", "fwd"), ("update", "dq"), ("update", "dkv")):
        assert re.search(rf"^{phase} +splash_mha_{kernel}\w* +[1-9]", printed, re.MULTILINE)
    for name in ("prefill", "decode", "scoring", "update", "evaluation decode"):
        assert f"compiled {name} in" in printed


@pytest.mark.slow
@needs_compiler
def test_a_search_ranks_the_layouts_that_fit(toy_policy, capsys):
    sets = [
        f"model.path={toy_policy}",
        "cpu_devices=0",
        "slices=[v5e-4]",
        "model.compute_dtype=bfloat16",
        "rollout.group_size=4",
    ]
    assert (
        preflight(load([], [*sets, "rollout.prompts=2", "rollout.max_new_tokens=64", "eval.problems=8"]), search=True)
        == 0
    )
    tried, _, ranked = capsys.readouterr().out.partition("layouts fit v5e-4, fastest first")
    layouts = re.findall(r"^ +fits +mesh=(dp:\d,fsdp:\d,tp:1) loss\.rows=(\d)", tried, re.MULTILINE)
    # One key/value head, so no tp; eight sequences, so at most eight rows.
    assert {mesh for mesh, _ in layouts} == {"dp:1,fsdp:4,tp:1", "dp:2,fsdp:2,tp:1", "dp:4,fsdp:1,tp:1"}
    assert {rows for _, rows in layouts} == {"4", "8"}
    seconds = [float(found) for found in re.findall(r"^ +([\d.]+) s +[\d.]+ GiB  mesh=", ranked, re.MULTILINE)]
    assert len(seconds) == len(layouts) == 6
    assert seconds == sorted(seconds)


@pytest.mark.slow
@needs_compiler
def test_a_search_tells_that_nothing_fits(plan, monkeypatch, capsys):
    small = replace(find_slice("v5e-1"), chip=replace(find_slice("v5e-1").chip, usable_bytes=2 * GIB))
    monkeypatch.setattr("grpo_trainer.assemble.preflight.search.find_slice", lambda name: small)
    assert preflight(plan.config, search=True) == 1
    printed = capsys.readouterr().out
    assert "skipped  mesh=dp:1,fsdp:1,tp:1 loss.rows=1: parameters and optimizer alone take 5.5 GiB" in printed
    assert "nothing fits v5e-1" in printed
