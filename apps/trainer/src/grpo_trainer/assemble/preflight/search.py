"""Other layouts of a run: scheduled in the order of what arithmetic promises, until no other can be faster.

Branch and bound: the least that a layout's step can take is known at once (`floor`), what its programs take once they
are scheduled. The most promising layout is next; layouts share programs, so what was measured tells of many. When the
fastest that fits beats the bound of all others, it is the fastest of all, and its code is generated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_contracts import GrpoError
from grpo_mesh import Slice, bytes_per_device, find_slice, make_mesh, slice_devices
from grpo_mesh.preflight import GIB, Measured, Program, Verdict, judge
from grpo_sampler import ModelConfig, decoding_sizes
from grpo_trainer.assemble.blueprint import Blueprint, blueprint
from grpo_trainer.assemble.preflight.apart import Compilers
from grpo_trainer.assemble.preflight.floor import least_activations, least_rollout, least_update
from grpo_trainer.assemble.preflight.programs import CompilerError, generate_code, judge_step, programs
from grpo_trainer.settings.schema import Settings

__all__ = ["Candidate", "candidates", "search_layouts"]

_ROWS_OF_A_SHARD = (1, 2, 4, 8, 16, 32)
_DECODING = ("rollout", "evaluation")  # phases that run on the rollout mesh


@dataclass(frozen=True)
class Candidate:
    """A layout to try.

    Args:
        dp, fsdp, tp: sizes of the mesh's axes.
        rows: of a micro-batch.
        remat: whether activations are computed again.
        rollout_tp: of the rollout mesh, whose other devices spread the sequences.
        slots: sequences decoded at once; 0: all of a step.
    """

    dp: int
    fsdp: int
    tp: int
    rows: int
    remat: bool
    rollout_tp: int
    slots: int = 0

    def apply(self, settings: Settings) -> Settings:
        """The settings with this layout."""
        loss = settings.loss.model_copy(update={"rows": self.rows})
        rollout = settings.rollout.model_copy(update={"mesh": self.rollout_mesh, "slots": self.slots})
        model = settings.model.model_copy(update={"remat": self.remat})
        return settings.model_copy(update={"mesh": self.mesh, "rollout": rollout, "loss": loss, "model": model})

    @property
    def mesh(self) -> str:
        """As in the settings."""
        return f"dp:{self.dp},fsdp:{self.fsdp},tp:{self.tp}"

    @property
    def rollout_mesh(self) -> str:
        """As in the settings: empty where the training mesh splits decoding as well."""
        if self.rollout_tp == self.tp:
            return ""
        return f"dp:{self.dp * self.fsdp * self.tp // self.rollout_tp},tp:{self.rollout_tp}"

    @property
    def learning(self) -> tuple[str, bool, int]:
        """What the programs of an update depend on; more rows need more memory."""
        return self.mesh, self.remat, self.rows

    @property
    def decoding(self) -> tuple[int, int]:
        """What the programs of a rollout depend on."""
        return self.rollout_tp, self.slots

    def __str__(self) -> str:
        parts = f"mesh={self.mesh}", f"loss.rows={self.rows}", f"model.remat={str(self.remat).lower()}"
        rollout = [f"rollout.mesh={self.rollout_mesh}"] if self.rollout_mesh else []
        return " ".join([*parts, *rollout, *([f"rollout.slots={self.slots}"] if self.slots else [])])


def candidates(settings: Settings, model: ModelConfig, chips: int) -> Iterator[Candidate]:
    """List the layouts whose sizes divide: fsdp before dp, few rows before many, small `tp` of rollouts before large.

    `loss.prompts` and `loss.blocks` stay as they are: which of them is best depends on the lengths of completions, and
    a step is judged with every completion at its limit.

    Args:
        settings: of the run; a micro-batch never holds more rows than a step has sequences.
        model: `tp` must divide its heads of both kinds; that of rollouts may repeat the key/value heads.
        chips: of the slice.

    Yields:
        Candidates, grouped by mesh.
    """
    sequences = settings.rollout.prompts * settings.rollout.group_size
    slots = sequences
    given = min(settings.rollout.slots or sequences, sequences)
    waves = {sequences, given}
    while slots % 2 == 0 and slots // 2 >= settings.rollout.group_size:
        waves.add(slots := slots // 2)
    decodings = [
        (tp, 0 if count == sequences else count)
        for count in sorted(waves, reverse=True)
        for tp in range(1, chips + 1)
        if chips % tp == 0 and _spreads(chips // tp, count, settings.eval.slots)
    ]
    repeated = decoding_sizes(model, chips)
    for tp in (n for n in range(1, chips + 1) if chips % n == 0 and model.kv_heads % n == 0):
        shards = chips // tp
        sampling = [(size, slots) for size, slots in decodings if size in repeated]
        # On the training mesh slots are padded to what divides.
        sampling += [it for it in ((tp, 0), (tp, 0 if given == sequences else given)) if it not in sampling]
        for dp in (n for n in range(1, shards + 1) if shards % n == 0):
            if model.width % (shards // dp):
                continue
            for rows in (shards * n for n in _ROWS_OF_A_SHARD if shards * n <= max(sequences, shards)):
                for remat in (False, True):
                    for rollout_tp, slots in dict.fromkeys(sampling):
                        yield Candidate(dp, shards // dp, tp, rows, remat, rollout_tp, slots)


def search_layouts(settings: Settings, model: ModelConfig, slice_name: str, *, quick: bool = False) -> int:
    """Find the fastest layout that fits, and print what was compiled, fastest first.

    Args:
        settings: resolved.
        model: dimensions of the policy.
        slice_name: the slice to find layouts for.
        quick: do not generate the code of the fastest one.

    Returns:
        0 if any fits, 1 if none does.
    """
    target = find_slice(slice_name)
    layouts = list(candidates(settings, model, target.chips))
    meshes, updates = len({layout.mesh for layout in layouts}), len({layout.learning for layout in layouts})
    print(
        f"search   {len(layouts)} layouts of {meshes} meshes for {target.name}, {updates} updates and "
        f"{len({layout.decoding for layout in layouts})} rollouts; most promising first, each program scheduled once",
        flush=True,
    )
    with Compilers(model, slice_name) as compilers:
        floors = _floors(settings, model, target, layouts)
        search = _Search(settings, model, target, slice_devices(slice_name), compilers, floors)
        fitting = _fitting(search, layouts)
    if not fitting:
        print(f"nothing fits {target.name}: take more chips or a smaller model")
        return 1
    print(f"\n{len(fitting)} layouts fit {target.name}, fastest first (expected seconds of a step at its limits):")
    for layout, verdict in fitting:
        print(f"  {verdict.seconds:7.1f} s, at best {verdict.best:.1f} s  {verdict.peak / GIB:6.2f} GiB  {layout}")
    if quick:
        return 0
    for layout, _ in fitting:
        print(f"\n{layout}", flush=True)
        try:
            if generate_code(search.plan(layout), target).fits:
                return 0
        except CompilerError as error:
            print(f"  failed   {error}", flush=True)
    return 1


def _fitting(search: _Search, layouts: list[Candidate]) -> list[tuple[Candidate, Verdict]]:
    """Try layouts until no other can be faster than the fastest that fits; those that fit, fastest first."""
    fitting: list[tuple[Candidate, Verdict]] = []
    while layouts:
        layout = min(layouts, key=search.bound)
        fastest = min((verdict.seconds for _, verdict in fitting), default=float("inf"))
        if (bound := search.bound(layout)) >= fastest:
            count = sum(not search.given_up(layout) for layout in layouts)
            print(f"left out {count} layouts: none can take less than {bound:.1f} s", flush=True)
            break
        layouts.remove(layout)
        if (verdict := search.try_layout(layout)) and verdict.fits:
            fitting.append((layout, verdict))
    return sorted(fitting, key=lambda pair: pair[1].seconds)


@dataclass
class _Search:
    """What is known of a run's layouts.

    Args:
        settings: of the run.
        model: dimensions of the policy.
        target: the slice.
        devices: of the slice.
        compilers: for the slice.
        seconds: that a `Candidate.learning` or `.decoding` takes of a step: the least by arithmetic, and as expected
            once its programs are scheduled, without the move of weights, which depends on both.
        compiled: programs measured so far.
        hopeless: each finds the layouts that share the reason for which one was given up.
    """

    settings: Settings
    model: ModelConfig
    target: Slice
    devices: Sequence[Any]
    compilers: Compilers
    seconds: dict[tuple, float]
    compiled: dict[tuple, Measured] = field(default_factory=dict)
    hopeless: list[Callable[[Candidate], bool]] = field(default_factory=list)

    def bound(self, layout: Candidate) -> float:
        """Seconds that a step is expected to take at least."""
        return self.seconds[layout.learning] + self.seconds[layout.decoding]

    def given_up(self, layout: Candidate) -> bool:
        """Whether the layout shares the reason for which another one was given up."""
        return any(more(layout) for more in self.hopeless)

    def plan(self, layout: Candidate) -> Blueprint:
        """The run with this layout."""
        return blueprint(layout.apply(self.settings), self.model, make_mesh(layout.mesh, self.devices))

    def try_layout(self, layout: Candidate) -> Verdict | None:
        """Schedule what is new in a layout, and print a line on it.

        Args:
            layout: to try.

        Returns:
            The verdict; None where its programs were not all scheduled.
        """
        if self.given_up(layout):
            return None
        try:
            plan = self.plan(layout)
        except GrpoError as error:
            print(f"  skipped  {layout}: {error}", flush=True)
            return None
        if needed := self._too_much(plan, layout):
            print(f"  skipped  {layout}: {needed}", flush=True)
            return None
        try:
            measured = self._measured(plan, layout)
        except CompilerError as error:
            # A layout that the compiler fails at is no reason to give up the others.
            print(f"  failed   {layout}: {str(error).splitlines()[0]}", flush=True)
            return None
        verdict = judge_step(plan, measured, self.target)
        peak = f"peak {verdict.peak / GIB:.2f} GiB during {verdict.fullest.name}"
        if verdict.fits:
            print(
                f"  fits     {layout}: {peak}, step {verdict.seconds:.1f} s, at best {verdict.best:.1f} s", flush=True
            )
        else:
            print(f"  too big  {layout}: {peak}", flush=True)
            self.hopeless.append(_no_less_than(layout, verdict.fullest))
        return verdict

    def _too_much(self, plan: Blueprint, layout: Candidate) -> str:
        """What alone is larger than a device's memory; empty if nothing is."""
        state = bytes_per_device((plan.state, plan.frozen, plan.reference))
        kept = least_activations(plan.settings, self.model, shards=plan.shards, tp=plan.tensor)
        for what, held, decoding in (
            ("parameters, optimizer and what a micro-batch keeps for the backward pass", state + kept, False),
            ("parameters, optimizer, decoding weights and cache", _rollout_bytes(plan), True),
        ):
            if held > self.target.chip.usable_bytes:
                self.hopeless.append(_at_least(layout, decoding=decoding))
                return f"{what} take {held / GIB:.1f} GiB alone"
        return ""

    def _measured(self, plan: Blueprint, layout: Candidate) -> list[Measured]:
        """A run's programs, up to one that does not fit; those that other layouts compiled are taken from there."""
        measured: dict[str, Measured] = {}
        wanted = list(programs(plan))
        new = [program for program in wanted if self._key(program, layout) not in self.compiled]
        scheduled = self.compilers.measure([replace(program, beside=0) for program in new], plan.settings)
        with contextlib.closing(scheduled):
            for program in wanted:
                key = self._key(program, layout)
                beside = program.beside(measured) if callable(program.beside) else program.beside
                if key not in self.compiled:
                    try:
                        self.compiled[key] = next(scheduled)
                    except CompilerError:
                        self.hopeless.append(_sharing(layout, program))
                        raise
                measured[program.name] = replace(self.compiled[key], beside=beside)
                if measured[program.name].peak > self.target.chip.usable_bytes and program.phase != "start":
                    return list(measured.values())
        apart = [program for name, program in measured.items() if name != "weights"]
        for key, phases in ((layout.learning, ("scoring", "update")), (layout.decoding, ("rollout",))):
            self.seconds[key] = judge(apart, self.target, phases=phases).seconds
        return list(measured.values())

    def _key(self, program: Program, layout: Candidate) -> tuple:
        """What tells the program from that of the same name in other layouts."""
        if program.phase == "start":
            return program.name, layout.mesh
        if program.name == "weights":
            return program.name, layout.mesh, layout.rollout_tp
        if program.phase == "evaluation" and self.settings.eval.slots:
            return program.name, layout.rollout_tp
        of = layout.decoding if program.phase in _DECODING else layout.learning
        return program.name, *of


def _floors(settings: Settings, model: ModelConfig, target: Slice, layouts: Sequence[Candidate]) -> dict[tuple, float]:
    """Least expected seconds of every `Candidate.learning` and `.decoding`."""
    floors: dict[tuple, float] = {}
    for layout in layouts:
        of = layout.apply(settings)
        if layout.learning not in floors:
            least = least_update(of, model, target, dp=layout.dp, fsdp=layout.fsdp, tp=layout.tp)
            floors[layout.learning] = least.expected
        if layout.decoding not in floors:
            floors[layout.decoding] = least_rollout(of, model, target, tp=layout.rollout_tp).expected
    return floors


def _spreads(shards: int, *slots: int) -> bool:
    return all(count % shards == 0 for count in slots)


def _no_less_than(layout: Candidate, fullest: Measured) -> Callable[[Candidate], bool]:
    """Finds the layouts that need no less memory than one whose fullest program does not fit."""
    if fullest.name == "weights":  # what a move of weights needs besides depends on both meshes
        return _sharing(layout, fullest)
    return _at_least(layout, decoding=fullest.phase in _DECODING)


def _sharing(layout: Candidate, program: Program | Measured) -> Callable[[Candidate], bool]:
    """Finds the layouts that need this program of a layout."""

    def shares(other: Candidate) -> bool:
        if program.name == "weights":
            return (other.mesh, other.rollout_tp) == (layout.mesh, layout.rollout_tp)
        if program.phase in _DECODING:
            return other.decoding == layout.decoding
        return other.mesh == layout.mesh if program.phase == "start" else other.learning == layout.learning

    return shares


def _at_least(layout: Candidate, *, decoding: bool) -> Callable[[Candidate], bool]:
    """Finds the layouts that need no less memory than one that does not fit, for decoding or for an update.

    Each of fsdp and tp splits parameters, adapters not alike; tp splits an update's activations, too.
    """

    def more(other: Candidate) -> bool:
        if other.fsdp > layout.fsdp or other.tp > layout.tp:
            return False
        if decoding:
            return other.rollout_tp == layout.rollout_tp and (not other.slots or 0 < layout.slots <= other.slots)
        return other.tp == layout.tp and other.rows >= layout.rows and layout.remat >= other.remat

    return more


def _rollout_bytes(plan: Blueprint) -> int:
    """Bytes that a device holds at least while it decodes."""
    rollout, network = plan.settings.rollout, plan.network(plan.state.params, *plan.frozen)
    streaming = rollout.prompts * rollout.group_size > plan.sampler.slots
    decoding = plan.sampler.allocation(network, group_size=rollout.group_size, streaming=streaming)
    return bytes_per_device((plan.state, plan.frozen, plan.reference, decoding))
