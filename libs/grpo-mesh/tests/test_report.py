import jax
import jax.numpy as jnp
import pytest

from grpo_mesh import MeshError, compile_report, compile_with_text
from grpo_mesh._tally import Program


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def test_one_product():
    report = compile_report(compiled(jnp.dot, (64, 128), (128, 32)))
    assert report.flops == 2 * 64 * 128 * 32
    assert report.arguments == 4 * (64 * 128 + 128 * 32)
    assert report.outputs == 4 * 64 * 32
    assert report.traffic == pytest.approx(report.arguments + report.outputs, rel=0.2)
    assert report.peak >= report.arguments + report.outputs
    assert report.collectives == {}


@pytest.mark.parametrize("layers", [1, 3, 12])
def test_a_scan_over_layers_is_counted_whole(layers):
    def loss(weights, x):
        return (jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0] ** 2).sum()

    report = compile_report(compiled(jax.value_and_grad(loss), (layers, 64, 64), (16, 64)))
    # One product forward, two backward; the input's gradient is not asked for, so the first layer's may be dropped.
    one = 2 * 16 * 64 * 64
    assert (3 * layers - 1) * one <= report.flops <= 3 * layers * one
    assert report.unknown_loops == 0


def test_only_the_slice_of_stacked_weights_is_read():
    def forward(weights, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    layers, width = 10, 256
    report = compile_report(compiled(forward, (layers, width, width), (8, width)))
    weights = 4 * layers * width * width
    assert weights <= report.traffic < 4 * weights  # reading the whole stack in every layer would be 10 times


def test_a_loop_without_a_known_end_is_reported_and_can_be_assumed():
    def decode(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: jnp.tanh(x @ w), x)

    program = compiled(decode, (8, 64), (64, 64))
    once, many = compile_report(program), compile_report(program, unknown_trips=50)
    assert once.unknown_loops == 1
    assert once.flops == 2 * 8 * 64 * 64
    assert many.flops == 50 * once.flops


def test_the_costlier_branch_counts():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    report = compile_report(compiled(either, (8, 64), (64, 64)))
    assert report.flops == 2 * 2 * 8 * 64 * 64


@pytest.mark.parametrize(
    ("shares", "products"),
    [
        pytest.param({"choice": (0.5, 0.25, 0.25)}, 0.5 + 2 * 0.25 + 3 * 0.25 + 3, id="in the scope"),
        pytest.param({"choi": (1, 0, 0)}, 6, id="of another scope"),
        pytest.param({"choice": (0.5, 0.5)}, 6, id="of another number of branches"),
    ],
)
def test_branches_count_as_often_as_they_are_taken(shares, products):
    """One, two or three products, in the scope and once more outside it."""

    def switches(x, w):
        choose = lambda x: jax.lax.switch(  # noqa: E731
            x[0, 0].astype(int), [lambda: x @ w, lambda: x @ w @ w, lambda: x @ w @ w @ w]
        )
        with jax.named_scope("choice"):
            x = choose(x)
        return choose(x)

    program = compiled(switches, (8, 64), (64, 64))
    assert compile_report(program, branch_shares=shares).flops == products * 2 * 8 * 64 * 64


def test_the_text_that_the_compiler_writes_tells_the_same():
    def loss(w, x):
        return (jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0] ** 2).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 64, 64), (16, 64))]
    program, text = compile_with_text(jax.jit(jax.grad(loss)).lower(*shapes).compile)
    assert compile_report(program, text=text) == compile_report(program)
    assert compile_report(program).flops == 3 * 3 * 2 * 16 * 64 * 64


@pytest.mark.parametrize("named", [True, False])
def test_elements_of_tuples_need_no_instruction_of_their_own(named):
    pair = "  %pair = (f32[4,4]{1,0}, f32[2]{0}) get-tuple-element(%p), index=1\n"
    left = "  %left = f32[4,4]{1,0} get-tuple-element(%pair), index=0\n"
    contracted = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    operand = "%left" if named else "%p#1#0"  # as jaxlib 0.12 writes it
    text = f"""HloModule m

ENTRY %main (p: (f32[8], (f32[4,4], f32[2]))) -> f32[4,4] {{
  %p = (f32[8]{{0}}, /*index=1*/(f32[4,4]{{1,0}}, f32[2]{{0}})) parameter(0)
{pair + left if named else ""}  ROOT %dot = f32[4,4]{{1,0}} dot({operand}, {operand}), {contracted}
}}
"""
    tally = Program(text).tally()
    assert (tally.flops, tally.traffic) == (2 * 4 * 4 * 4, 3 * 4 * 4 * 4)


def test_kernels_are_counted_whether_or_not_they_declare_their_cost():
    call = 'custom-call(%p), custom_call_target="tpu_custom_call"'
    declared = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"96","bytes_accessed":"64"}}}'
    text = f"""HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %flash.1 = f32[8]{{0}} {call}, {declared}
  %flash.2 = f32[8]{{0}} {call}, {declared}
  ROOT %splash.1 = f32[8]{{0}} {call}, backend_config={{}}
}}
"""
    tally = Program(text).tally()
    assert (tally.flops, tally.kernels, tally.undeclared) == (192, {"flash": 2, "splash": 1}, {"splash"})


def test_a_program_from_a_cache_is_read_back():
    program = jax.jit(jnp.sin).lower(1.0).compile()
    assert compile_with_text(lambda compiler_options: program) == (program, program.as_text())


def test_a_program_at_another_stage_is_refused():
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(MeshError, match=r"needs a compiled program: got a lowered one. Pass `lowered.compile\(\)`"):
        compile_report(lowered)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match=r"pass `lowered.compile`, not what it returns"):
        compile_with_text(lowered.compile())


def test_a_program_that_cannot_be_read_back_is_refused_with_the_way_out():
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: Async done requires its operand to be an asynchronous op\n  at 1"
            )

        def memory_analysis(self):
            return None

    with pytest.raises(MeshError, match=r"asynchronous op\. Compile it with `compile_with_text`"):
        compile_report(Unreadable())  # type: ignore[arg-type]


def test_what_a_nested_fusion_only_renames_is_read():
    text = """HloModule renamed

%renames (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  ROOT %b = f32[1024]{0} bitcast(%a)
}

%doubles (c: f32[1024]) -> f32[1024] {
  %c = f32[1024]{0} parameter(0)
  %d = f32[1024]{0} fusion(%c), kind=kLoop, calls=%renames
  ROOT %e = f32[1024]{0} add(%d, %d)
}

ENTRY %main (f: f32[1024]) -> f32[1024] {
  %f = f32[1024]{0} parameter(0)
  ROOT %g = f32[1024]{0} fusion(%f), kind=kLoop, calls=%doubles
}
"""
    assert Program(text).tally().traffic == 2 * 4 * 1024  # read once, written once


@pytest.mark.parametrize(("outside", "times"), [(True, 1), (False, 28)])
def test_a_collective_that_overlaps_a_loop_is_counted_where_it_starts(outside, times):
    """As the TPU compiler writes it: the same channel in the fusions of its start, middle and end."""
    gather = "all-gather(%a), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}"
    trips = 'backend_config={"known_trip_count":{"n":"28"}}'
    start = "  %started = f32[64]{0} fusion(%x), kind=kCustom, calls=%start\n"
    text = f"""HloModule overlapped

%start (a: f32[16]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  ROOT %gathered = f32[64]{{0}} {gather}
}}

%async_collective_fusion.1 (a: f32[16]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  ROOT %going = f32[64]{{0}} {gather}
}}

%done (a: f32[16]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  ROOT %gathered = f32[64]{{0}} {gather}
}}

%body (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
{"" if outside else start}  %middle = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %next = f32[16]{{0}} negate(%x)
}}

%condition (x: f32[16]) -> pred[] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %more = pred[] constant(true)
}}

ENTRY %main (x: f32[16]) -> f32[64] {{
  %x = f32[16]{{0}} parameter(0)
{start if outside else ""}  %loop = f32[16]{{0}} while(%x), condition=%condition, body=%body, {trips}
  ROOT %end = f32[64]{{0}} {"fusion(%x), kind=kCustom, calls=%done" if outside else "broadcast(%loop), dimensions={}"}
}}
"""
    assert Program(text).tally().collectives == {"all-gather": [times, times * 4 * 64]}
