"""Preflight: a run's programs, its verdict and its advice; and a small run compiled for a slice that is not there."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import pytest

from grpo_mesh import CompileReport, MeshError, SupervisedProcess, find_slice, make_mesh, shardings, slice_devices
from grpo_mesh.preflight import EFFICIENCY, GIB, Measured, Work
from grpo_mesh.preflight import measure as measure_programs
from grpo_sampler import ModelConfig, abstract
from grpo_trainer.assemble.blueprint import RULES, blueprint
from grpo_trainer.assemble.policy import model_config
from grpo_trainer.assemble.preflight import search
from grpo_trainer.assemble.preflight.advice import advice
from grpo_trainer.assemble.preflight.apart import _REPLY, Compilers, _Compiler, _Reply
from grpo_trainer.assemble.preflight.command import preflight, report
from grpo_trainer.assemble.preflight.floor import least_activations, least_rollout, least_update
from grpo_trainer.assemble.preflight.programs import CompilerError, judge_step, programs
from grpo_trainer.assemble.preflight.search import Candidate, candidates
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler comes with libtpu, which is not installed"
)
TASK = cast(Task, SimpleNamespace(policies={}))  # preflight for a slice asks a task for its policies alone
QWEN: dict[str, Any] = {
    "slices": ["v5e-1"],
    "cpu_devices": 0,
    "mesh": "dp:1,fsdp:-1,tp:1",
    "data": {"max_prompt_length": 512},
    "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct", "compute_dtype": "bfloat16", "remat": True},
    "rollout": {"prompts": 16, "group_size": 8, "max_new_tokens": 1024},
    "loss": {"row_length": 1024, "rows": 2, "blocks": 1},
}
# One layer: of a prompt's last layer only keys and values are needed, so its prefill has no attention kernel.
TOY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 256,
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


def qwen(**sections: Any) -> Settings:
    """Full fine-tuning of Qwen2.5-0.5B, with changes to sections of its settings."""
    merged = dict(QWEN)
    for name, change in sections.items():
        merged[name] = merged.get(name, {}) | change if isinstance(change, dict) else change
    return Settings.model_validate(merged)


def plan_of(settings: Settings):
    return blueprint(settings, model_config(settings.model.path, {}), make_mesh("auto", jax.devices()[:1]))


@pytest.fixture(scope="module")
def plan():
    return plan_of(qwen())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a policy without weights."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.json").write_text(json.dumps(TOY))
    return {
        "cpu_devices": 0,
        "model": {"path": str(folder), "compute_dtype": "bfloat16", "remat": True},
        "data": {"max_prompt_length": 64},
        "rollout": {"prompts": 8, "max_new_tokens": 64},
    }


def measured(name: str, phase: str, peak_gib: float, *, work: Work | None = None, beside_gib: float = 0) -> Measured:
    temporaries = GIB
    figures = CompileReport(int(peak_gib * GIB) - temporaries, 0, 0, temporaries, 0, 0.0, 0.0, {}, {}, 0)
    return Measured(name, phase, int(beside_gib * GIB), 2.0, figures, 0, work or Work())


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
    ],
)
def test_shipped_dimensions_give_the_published_number_of_parameters(path, parameters):
    _, shapes = abstract(model_config(path, {}))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


def test_dimensions_of_another_hub_id_are_asked_for():
    with pytest.raises(ConfigError, match=r"qwen2\.5-7b.*got model\.path='meta/Llama'.*config\.json into a folder"):
        model_config("meta/Llama", {})


def test_a_folder_needs_no_weights(toy):
    assert model_config(toy["model"]["path"], {}).layers == 1


def test_a_run_s_programs_are_listed_in_its_order(plan):
    decoding = ["weights", "cache", "prefill", "decode", "shrink"]
    evaluation = [f"evaluation {name}" for name in decoding[1:]]
    names = [program.name for program in programs(plan)]
    assert names == ["start", *decoding, *evaluation, "scoring", "update"]
    assert [program.name for program in programs(plan, phases=("scoring", "update"))] == names[-2:]
    without = plan_of(qwen(eval={"every": 0, "before": False, "after": False}))
    assert [program.name for program in programs(without)] == ["start", *decoding, "scoring", "update"]


def test_what_stays_beside_a_program_counts(plan):
    target = find_slice("v5e-1")
    fits = judge_step(plan, [measured("decode", "rollout", 15.0)], target)
    assert fits.fits
    assert advice(plan, fits) == []
    full = judge_step(plan, [measured("decode", "rollout", 15.0, beside_gib=1.0)], target)
    assert not full.fits
    assert full.fullest.name == "decode"


def test_a_run_that_fits_says_so_with_its_step(plan):
    chip = find_slice("v5e-1").chip
    work = Work(chip.flops, chip.hbm_bandwidth, {"all-gather": (3, chip.ici_bandwidth)})
    verdict = judge_step(plan, [measured("update", "update", 12.0, work=work)], find_slice("v5e-1"))
    text = report(plan, verdict)
    assert verdict.seconds == pytest.approx(1 / EFFICIENCY["compute"] + 1 / EFFICIENCY["network"])
    assert "fits v5e-1: peak 12.00 GiB of 15.75 GiB a device, during update" in text
    assert f"{16 * 8 * 1024 / verdict.seconds:,.0f} tokens/s" in text
    assert "all-gather" in text


def test_a_report_names_what_a_device_holds(plan):
    # AdamW has two float32 moments for each parameter.
    text = report(plan, judge_step(plan, [measured("weights", "rollout", 3.0)], find_slice("v5e-1")))
    assert re.search(r"^parameters +float32 +1\.84 GiB$", text, re.MULTILINE)
    assert re.search(r"^optimizer +moments, and master copy if any +3\.68 GiB$", text, re.MULTILINE)
    assert "reference" not in text
    assert re.search(r"^decoding weights +bfloat16, during rollouts", text, re.MULTILINE)
    frozen = plan_of(qwen(loss={"reference": "initial", "kl_coefficient": 0.01}))
    text = report(frozen, judge_step(frozen, [measured("update", "update", 3.0)], find_slice("v5e-1")))
    assert re.search(r"^reference +float32 +1\.84 GiB$", text, re.MULTILINE)


def test_a_run_that_does_not_fit_says_what_to_change(plan):
    def text_of(plan, program, slice_name):
        return report(plan, judge_step(plan, [program], find_slice(slice_name)))

    text = text_of(plan, measured("update", "update", 17.0), "v5e-1")
    assert "DOES NOT FIT v5e-1" in text
    assert "change loss.rows=1: smaller micro-batches" in text
    assert "change --slice v5e-4: parameters and optimizer take 5.52 GiB of a device here, and 1.25 GiB" in text
    assert "remat" not in text  # on already
    assert "row_length" not in text  # as short as its completions already
    wide = plan_of(qwen(loss={"row_length": 0}))
    text = text_of(wide, measured("update", "update", 17.0), "v5e-1")
    assert "change loss.row_length=1024: shorter rows" in text
    assert "loss.chunk" not in text
    small = plan_of(qwen(loss={"chunk": 64}))
    assert "loss.chunk" not in text_of(small, measured("update", "update", 17.0), "v5e-1")
    large = plan_of(qwen(loss={"chunk": 2048}))
    assert "change loss.chunk=0: logits of fewer" in text_of(large, measured("update", "update", 17.0), "v5e-1")
    text = text_of(plan, measured("decode", "rollout", 20.0), "v5e-4")
    assert "change rollout.slots=64" in text
    assert "change rollout.mesh=dp:-1,tp:2: decoding holds 1/2 of the weights" in text


def test_a_program_that_the_compiler_refuses_does_not_fit(plan):
    refused = replace(measured("update", "update", 1.0), report=None, refused=20 * GIB)
    verdict = judge_step(plan, [refused], find_slice("v5e-1"))
    assert not verdict.fits
    assert verdict.peak == 20 * GIB
    assert "refused" in report(plan, verdict)


def test_candidates_divide():
    settings = qwen(model={"path": "Qwen/Qwen2.5-7B"})
    found = list(candidates(settings, model_config(settings.model.path, {}), 16))
    assert len(found) == len(set(found))
    assert {candidate.tp for candidate in found} == {1, 2, 4}  # four key/value heads
    assert {candidate.rollout_tp for candidate in found} == {1, 2, 4}  # 8 does not divide 28 query heads
    assert {candidate.slots for candidate in found} == {0, 64, 32, 16, 8}  # a group has eight
    assert found[0] == Candidate(1, 16, 1, 16, False, 1)
    assert "rollout.mesh" not in str(found[0])
    assert str(found[1]) == "mesh=dp:1,fsdp:16,tp:1 loss.rows=16 model.remat=false rollout.mesh=dp:8,tp:2"
    for candidate in found:
        assert candidate.dp * candidate.fsdp * candidate.tp == 16
        assert candidate.rows % (candidate.dp * candidate.fsdp) == 0
        applied = candidate.apply(settings)
        assert applied.mesh == candidate.mesh
        assert (applied.rollout.mesh, applied.rollout.slots) == (candidate.rollout_mesh, candidate.slots)
        assert (applied.loss.rows, applied.model.remat) == (candidate.rows, candidate.remat)


def test_the_slots_that_are_set_are_tried():
    settings = qwen(model={"path": "Qwen/Qwen2.5-7B"}, rollout=QWEN["rollout"] | {"slots": 6})
    found = list(candidates(settings, model_config(settings.model.path, {}), 4))
    assert {candidate.slots for candidate in found} == {0, 64, 32, 16, 8, 6}
    # On the training mesh 6 are padded; on another they must divide.
    assert {candidate.rollout_tp for candidate in found if candidate.slots == 6 and candidate.tp == 1} == {1, 2, 4}
    assert {candidate.rollout_tp for candidate in found if candidate.slots == 6 and candidate.tp == 4} == {2, 4}


def test_candidates_of_rollouts_divide_the_slots_and_may_repeat_heads():
    settings = qwen(model={"path": "Qwen/Qwen2.5-3B"}, eval={"slots": 4})
    found = list(candidates(settings, model_config(settings.model.path, {}), 8))
    assert {candidate.rollout_tp for candidate in found if candidate.tp == 1} == {1, 2, 4, 8}  # 1 is that of training
    assert {candidate.rollout_tp for candidate in found if candidate.tp == 2} == {2, 4, 8}


def test_the_floor_of_a_step_in_closed_form():
    """Two layers of width 8: every figure by hand."""
    model = ModelConfig(
        family="llama", vocab_size=100, width=8, mlp_width=16, layers=2, query_heads=4, kv_heads=2, head_size=2
    )
    settings = qwen(
        model={"remat": True},
        data={"max_prompt_length": 5},
        rollout={"prompts": 3, "group_size": 2, "max_new_tokens": 10},
        loss={"row_length": 10, "rows": 4},
    )
    target, chip = find_slice("v5e-4"), find_slice("v5e-4").chip
    layers = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    down, head = 2 * 8 * 16, 800
    rollout = least_rollout(settings, model, target, tp=4)
    # 60 tokens and 12 of prompts, these in one of two layers; a token attends to 4 + 5 keys of 4 heads of 2.
    assert rollout.work.flops == (2 * (layers + head) * 60 + 2 * layers * 6 + 4 * 2 * 8 * 9 * 60) / 4
    # Two heads are stored as four, one on each device; 3 prompts of 4 and 6 completions of 5 on average.
    assert rollout.work.traffic == 10 * 2 * ((layers + head) / 4 + 2 * 2 * 1 * 2 * (3 * 4 + 6 * 5))
    assert rollout.work.network == 10 * 2 * (2 * 2 * 8 * 6)
    update = least_update(settings, model, target, dp=1, fsdp=2, tp=2)
    assert (
        update.work.flops == (2 * (60 + 6) * (4 * layers - down) + 2 * 60 * 3 * head + 16 * 60 * 9 * 2 * 8) / 4
    )  # forward, again, and backward twice; attention backward as two passes
    # Six rows in two micro-batches, weights three times in each; parameter and two moments read and written.
    assert update.work.traffic == 2 * 2 * (3 * layers + 2 * head) / 2 + 2 * 12 * (layers + head) / 4
    assert update.work.network == 2 * (2 * 3 * layers + head) / 2 + 5 * 2 * 8 * 2 * 60 / 2
    assert update.compute == update.work.flops / chip.flops
    one = least_update(settings, model, find_slice("v5e-1"), dp=1, fsdp=1, tp=1)
    assert (one.work.network, one.work.flops) == (0, 4 * update.work.flops)
    assert least_activations(settings, model, shards=2, tp=2) == 2 * 10 * 2 * 8 * 2


def test_tp_that_does_not_divide_the_heads_is_refused():
    _, shapes = abstract(model_config("Qwen/Qwen2.5-0.5B", {}))
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("dp", "fsdp", "tp"))
    with pytest.raises(MeshError, match=r"layers/k.*must divide by tp = 4"):
        shardings(shapes, mesh, RULES)


def test_search_needs_a_slice():
    with pytest.raises(ConfigError, match="needs a slice"):
        preflight(qwen(slices=[]), TASK, search=True)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("slice_name", ["v5e-4", "v6e-1", "v4-8", "v5p-8"])
def test_a_small_run_is_compiled_for_a_slice(slice_name, toy, capsys):
    assert preflight(Settings.model_validate({**toy, "slices": [slice_name]}), TASK) == 0
    printed = capsys.readouterr().out
    assert "TPU_SKIP_MDS_QUERY=1" in printed
    assert "attention splash in training" in printed
    assert f"fits {slice_name}" in printed
    for kernel in ("fwd", "dq", "dkv"):  # read off the compiled program
        assert re.search(rf"^update +splash_mha_{kernel}\w* +[1-9]", printed, re.MULTILINE)
    for name in ("prefill", "decode", "scoring", "update", "evaluation decode"):
        assert f"scheduled {name} in" in printed
        assert f"compiled {name} in" in printed
    assert re.search(rf"^code +takes up to .* fits {slice_name}$", printed, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_a_quick_preflight_tells_the_same_figures(toy, capsys):
    settings = Settings.model_validate({**toy, "slices": ["v5e-4"], "mesh": "dp:1,fsdp:-1,tp:1"})
    assert preflight(settings, TASK, quick=True) == 0
    assert "compiled" not in capsys.readouterr().out.split("programs compiled in")[0]
    plan = blueprint(settings, model_config(settings.model.path, {}), make_mesh(settings.mesh, slice_devices("v5e-4")))
    with Compilers(plan.model, "v5e-4") as compilers:
        quick = list(compilers.measure(list(programs(plan)), settings))
    for one, whole in zip(quick, measure_programs(programs(plan)), strict=True):
        assert one.report is not None
        assert whole.report is not None
        assert (one.name, one.phase, one.beside, one.work) == (whole.name, whole.phase, whole.beside, whole.work)
        assert one.report.code == 0 < whole.report.code
        assert abs(whole.report.temporaries - one.report.temporaries) < 1 << 20
        rest = {"code": 0, "temporaries": 0}
        assert replace(one.report, **rest) == replace(whole.report, **rest)


def test_a_compiler_s_process_that_fails_is_told_with_what_it_printed(plan):
    [program] = programs(plan, phases=("start",))
    with Compilers(plan.model, "v5e-1") as compilers:
        for _ in range(2):  # the process that started it goes on
            with pytest.raises(CompilerError, match=r"(?s)at program 'nothing'.*ended with code 1.*printed: .*Error"):
                list(compilers.measure([replace(program, name="nothing")], plan.settings))


def test_a_reply_is_that_to_the_program_asked_for(tmp_path):
    """A process that ends badly after its reply sends another, which is not the next program's."""
    late, own = (_REPLY.dump_json(_Reply(name, failed=f"of {name}")) for name in ("start", "update"))
    compiler = object.__new__(_Compiler)
    replies = io.BytesIO(late + b"\n" + own + b"\n" + own[:9])
    compiler._process = cast(SupervisedProcess, SimpleNamespace(stdout=replies, end=lambda: -9))
    (tmp_path / "printed").write_bytes(b"before\nnow")
    with (tmp_path / "printed").open("r+b") as compiler._printed:
        compiler._asked_at = len(b"before\n")
        with pytest.raises(CompilerError, match=r"at program 'update': of update\. It printed: now$"):
            compiler.answer("update")
        with pytest.raises(CompilerError, match=r"at program 'decode': its process ended with code -9"):
            compiler.answer("decode")


def test_the_process_of_a_compiler_may_be_killed(plan):
    [program] = programs(plan, phases=("start",))
    with Compilers(plan.model, "v5e-1") as compilers:
        compilers._idle.append(killed := _Compiler())
        killed._process.kill()
        with pytest.raises(CompilerError, match="at program 'start': its process ended with code -9"):
            list(compilers.measure([program], plan.settings))


@pytest.mark.parametrize("option", ["search", "quick"])
def test_what_only_a_slice_has_is_refused_without_one(option):
    with pytest.raises(ConfigError, match=f"preflight --{option} needs a slice"):
        preflight(qwen(slices=[]), TASK, **{option: True})


def test_slots_beyond_a_step_s_sequences_are_all_of_them():
    settings = qwen(rollout={"slots": 256})
    every = list(candidates(settings, model_config(settings.model.path, {}), 4))
    assert {layout.slots for layout in every} == {0, 64, 32, 16, 8}


@pytest.mark.slow
@needs_compiler
def test_sizes_of_micro_batches_keep_no_second_gradient(toy):
    temporaries = []
    for sizes in (1, 4):
        settings = Settings.model_validate({**toy, "slices": ["v5e-1"], "mesh": "dp:1,fsdp:-1,tp:1"})
        settings = settings.model_copy(update={"loss": settings.loss.model_copy(update={"rows": 4, "sizes": sizes})})
        model = replace(model_config(settings.model.path, {}), vocab_size=65536, width=512)
        plan = blueprint(settings, model, make_mesh(settings.mesh, slice_devices("v5e-1")))
        [update] = measure_programs(programs(plan, phases=("update",)), code=False)
        assert update.report is not None
        temporaries.append(update.report.temporaries)
    gradient = 4 * 65536 * 512
    assert temporaries[1] < temporaries[0] + gradient // 2


def test_a_search_stops_when_no_other_layout_can_be_faster(monkeypatch, capsys):
    """Every program takes 1.3 times its floor, and what holds many rows without remat does not fit."""
    settings = qwen(slices=["v5e-4"])
    tried: list[tuple[Candidate, float]] = []

    def try_layout(self, layout):
        assert layout not in [one for one, _ in tried]
        for key in (layout.learning, layout.decoding):
            self.seconds[key] = 1.3 * floors[key]
        fits = layout.remat or layout.rows < 8
        tried.extend([(layout, self.bound(layout))] if fits else [])
        return SimpleNamespace(fits=fits, seconds=self.bound(layout), best=0.0, peak=GIB)

    model, target = model_config(settings.model.path, {}), find_slice("v5e-4")
    every = list(candidates(settings, model, target.chips))
    floors = search._floors(settings, model, target, every)
    monkeypatch.setattr(search, "slice_devices", lambda name: [])
    monkeypatch.setattr(search._Search, "try_layout", try_layout)
    assert search.search_layouts(settings, model, "v5e-4", quick=True) == 0
    printed = capsys.readouterr().out
    fastest = min(seconds for _, seconds in tried)
    assert 0 < len(tried) < len(every) / 2
    assert "left out" in printed
    for layout in every:
        floor = 1.3 * (floors[layout.learning] + floors[layout.decoding])
        assert floor >= fastest or not (layout.remat or layout.rows < 8)
    ranked = [float(found) for found in re.findall(r"^ +([\d.]+) s, at best", printed, re.MULTILINE)]
    assert ranked == sorted(ranked)
    assert len(ranked) == len(tried)


@pytest.mark.slow
@needs_compiler
def test_a_search_compiles_every_program_once(toy, monkeypatch, capsys):
    rollout = {"prompts": 2, "group_size": 4, "max_new_tokens": 64}
    settings = Settings.model_validate(
        {**toy, "slices": ["v5e-4"], "rollout": rollout, "eval": {"problems": 8, "slots": 8}}
    )
    compiled: list[str] = []
    tried: list[tuple[search._Search, Candidate]] = []

    def measure(self, wanted, settings):
        for measured in measure_some(self, wanted, settings):
            compiled.append(measured.name)
            yield measured

    def try_layout(self, layout):
        if len(tried) == 4:
            return None
        tried.append((self, layout))
        return try_once(self, layout)

    try_once = search._Search.try_layout
    measure_some = Compilers.measure
    monkeypatch.setattr(Compilers, "measure", measure)
    monkeypatch.setattr(search._Search, "try_layout", try_layout)
    assert preflight(settings, TASK, search=True) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"^ +fits +mesh=(\S+) .*peak", printed, re.MULTILINE)
    assert found
    assert set(found) <= {"dp:1,fsdp:4,tp:1", "dp:2,fsdp:2,tp:1", "dp:4,fsdp:1,tp:1"}  # one key/value head
    assert compiled.count("update") == len({layout.learning for _, layout in tried})
    assert compiled.count("decode") == len({layout.decoding for _, layout in tried})
    assert compiled.count("evaluation decode") == len({layout.rollout_tp for _, layout in tried})
    assert len(tried[0][0].compiled) == len(compiled)
    assert re.search(r"^code +takes up to .* fits v5e-4$", printed, re.MULTILINE)  # of the fastest


def test_what_does_not_fit_rules_out_what_needs_no_less():
    layout = Candidate(1, 4, 1, 8, True, 2, 64)
    update, decoding = (search._at_least(layout, decoding=decoding) for decoding in (False, True))
    for change, by_update, by_decoding in (
        ({}, True, True),
        ({"rows": 16}, True, True),
        ({"rows": 4}, False, True),
        ({"remat": False}, True, True),
        ({"slots": 0}, True, True),
        ({"slots": 32}, True, False),
        ({"rollout_tp": 4}, True, False),
        ({"dp": 2, "fsdp": 2}, True, True),
        ({"dp": 2, "fsdp": 2, "rows": 4}, False, True),
        ({"fsdp": 2, "tp": 2}, False, False),  # adapters lie otherwise
        ({"fsdp": 4, "tp": 2}, False, False),
    ):
        other = replace(layout, **change)
        assert (update(other), decoding(other)) == (by_update, by_decoding), change
    assert not search._at_least(replace(layout, remat=False), decoding=False)(layout)
    all_slots = search._at_least(replace(layout, slots=0), decoding=True)
    assert (all_slots(layout), all_slots(replace(layout, slots=0))) == (False, True)


@pytest.mark.parametrize(
    ("name", "phase", "ruled_out"),
    [
        ("weights", "rollout", {"other slots"}),  # another mesh moves weights otherwise: it may need less
        ("decode", "rollout", {"less fsdp"}),
        ("update", "update", {"less fsdp", "other slots", "other rollout"}),
    ],
)
def test_a_move_of_weights_that_does_not_fit_rules_out_no_other_mesh(name, phase, ruled_out):
    layout = Candidate(1, 8, 2, 32, True, 4, 64)
    others = {
        "other mesh": replace(layout, fsdp=4, tp=4),
        "less fsdp": replace(layout, dp=2, fsdp=4),
        "other rollout": replace(layout, rollout_tp=2),
        "other slots": replace(layout, slots=32),
        "more of all": replace(layout, fsdp=16),
    }
    fullest = Measured(name, phase, beside=0, seconds=0.0, report=None, refused=1, work=Work())
    no_less = search._no_less_than(layout, fullest)
    assert no_less(layout)
    assert {key for key, other in others.items() if no_less(other)} == ruled_out


@pytest.mark.slow
@needs_compiler
def test_compiled_programs_do_no_less_than_the_floor(tmp_path):
    """Of a model whose weights no chip keeps in its on-chip memory."""
    dimensions = {"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(TOY | dimensions | heads))
    settings = Settings.model_validate(
        {
            "slices": ["v5e-4"],
            "cpu_devices": 0,
            "mesh": "dp:1,fsdp:2,tp:2",
            "model": {"path": str(tmp_path), "compute_dtype": "bfloat16", "remat": True},
            "data": {"max_prompt_length": 128},
            "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 128},
            "loss": {"rows": 4, "row_length": 128, "blocks": 1},
        }
    )
    model, target = model_config(str(tmp_path), {}), find_slice("v5e-4")
    plan = blueprint(settings, model, make_mesh(settings.mesh, slice_devices("v5e-4")))
    step = judge_step(plan, list(measure_programs(programs(plan, phases=("rollout", "update")))), target)
    floors = [
        least_rollout(settings, model, target, tp=2),
        least_update(settings, model, target, dp=1, fsdp=2, tp=2),
    ]
    for phase, floor in zip(step.phases, floors, strict=True):
        assert phase.name == floor.name
        assert floor.work.flops <= phase.work.flops <= 1.3 * floor.work.flops
        assert floor.work.traffic <= phase.work.traffic
        assert 0 < floor.work.network <= phase.work.network
    assert step.phases[0].work.traffic <= 1.3 * floors[0].work.traffic


@pytest.mark.slow
@needs_compiler
def test_a_search_tells_that_nothing_fits(monkeypatch, capsys):
    small = replace(find_slice("v5e-1"), chip=replace(find_slice("v5e-1").chip, usable_bytes=2 * GIB))
    monkeypatch.setattr("grpo_trainer.assemble.preflight.search.find_slice", lambda name: small)
    assert preflight(qwen(), TASK, search=True) == 1
    printed = capsys.readouterr().out
    assert re.search(r"skipped  mesh=dp:1,fsdp:1,tp:1 loss\.rows=\d+ model\.remat=\w+: parameters, optimizer", printed)
    assert "nothing fits v5e-1" in printed
