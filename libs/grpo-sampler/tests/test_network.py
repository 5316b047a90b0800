"""The network against kept logits of transformers, and against itself in every way it can be run."""

import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from grpo_sampler import (
    ModelConfig,
    SamplerError,
    Transformer,
    _kernels,
    _packed,
    abstract,
    load_pretrained,
    merge,
    splash_flops,
    split,
)
from grpo_sampler._kernels import resolve_attention, self_attention, splash_attention
from grpo_sampler._layout import leaves
from grpo_sampler._packed_attention import plan_packed
from grpo_sampler._rope import rope_constants, rope_tables

REFERENCE = np.load(Path(__file__).parent / "data" / "parity.npz")
CASES = list(dict.fromkeys(name.split("/")[0] for name in REFERENCE.files))
TINY = ModelConfig("qwen3", 61, 32, 48, 3, 4, 2, 8, qk_norm=True, tied=True)
F32_BOUND = 1e-4


def write_checkpoint(case: str, folder: Path) -> ModelConfig:
    """The checkpoint that oracles/make_reference.py computed the kept logits from."""
    content = json.loads(str(REFERENCE[f"{case}/config"]))
    config = ModelConfig.from_hf(content)
    random = np.random.RandomState(CASES.index(case))
    shapes = {name: leaf.stored_shape for leaf in leaves(config) for name in leaf.tensor_names()}
    tensors = {}
    for name in sorted(shapes):
        value = random.standard_normal(shapes[name])
        value = 1 + 0.2 * value if "norm" in name else value * (0.5 if name.endswith("bias") else 0.15)
        tensors[name] = value.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content))
    return config


def reference_inputs(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(7)
    lengths = np.asarray([40, 17, 1, 29])
    tokens_BT = random.randint(0, vocab_size, (4, 40))
    return np.where(np.arange(40) < lengths[:, None], tokens_BT, 0).astype(np.int32), lengths


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    write_checkpoint(case, tmp_path)
    config, params = load_pretrained(tmp_path, dtype=jnp.float32)
    model = merge(abstract(config)[0], params)
    tokens_BT, lengths = reference_inputs(config.vocab_size)
    live = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    logits = (
        np.asarray(model(jnp.asarray(tokens_BT), None, jnp.asarray(live, jnp.int32)) @ model.unembedding.T)
        * live[..., None]
    )
    last = logits[np.arange(4), lengths - 1]
    assert np.abs(last - REFERENCE[f"{case}/last_logits"]).max() <= F32_BOUND
    normaliser = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    assert np.abs(normaliser - REFERENCE[f"{case}/logsumexp"]).max() <= F32_BOUND


def packed(stretch: int = 1):
    """Two prompts, three rows of packed completions in two blocks of 6 `stretch` tokens, and every sequence whole."""
    random = np.random.default_rng(0)
    length_P = np.asarray([7, 4], np.int32)
    prompt_PT = np.where(np.arange(9) < length_P[:, None], random.integers(0, 61, (2, 9)), 0).astype(np.int32)
    segment_RT = np.asarray([[1] * 5 + [0] + [2] * 6, [1] * 12, [1] * 2 + [2] * 3 + [3] * 4 + [0] * 3], np.int32)
    segment_RT = segment_RT.repeat(stretch, axis=1)
    prompt_RC = np.asarray([[1, 0], [0, 0], [1, 1]], np.int32)
    tokens_RT = random.integers(0, 61, segment_RT.shape).astype(np.int32)
    positions_RT = np.zeros_like(tokens_RT)
    whole = []
    for r, row in enumerate(segment_RT):
        for segment in range(1, row.max() + 1):
            at = np.nonzero(row == segment)[0]
            p = prompt_RC[r, at[0] // (6 * stretch)]
            positions_RT[r, at] = length_P[p] + np.arange(len(at))
            whole.append((r, at, np.concatenate([prompt_PT[p, : length_P[p]], tokens_RT[r, at]])[None]))
    return (prompt_PT, length_P, tokens_RT, positions_RT, segment_RT, prompt_RC), whole


@pytest.fixture(scope="module")
def tiny():
    graphdef, params = split(Transformer(TINY, rngs=nnx.Rngs(0)))
    # Weights large enough that attention is far from uniform.
    return graphdef, jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params)


def relative(a, b):
    """The largest relative difference of two trees' leaves, in the Euclidean norm."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def target(shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal((*shape, TINY.width)), jnp.float32)


# Blocks whose queries attend in one span and in four.
@pytest.fixture(scope="module", params=[1, 44])
def plain(tiny, request):
    """Hidden states of every segment, and gradients, from whole sequences in one right-padded batch."""
    graphdef, params = tiny
    batch, whole = packed(request.param)
    longest = max(tokens.shape[1] for _, _, tokens in whole)
    rows = np.concatenate([np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1]))) for _, _, tokens in whole])
    live = np.arange(longest) < np.asarray([[tokens.shape[1]] for _, _, tokens in whole])
    target_RTD = target(batch[2].shape)

    def loss(params):
        hidden = merge(graphdef, params)(jnp.asarray(rows), None, jnp.asarray(live, jnp.int32))
        parts = [hidden[i, tokens.shape[1] - len(at) : tokens.shape[1]] for i, (_, at, tokens) in enumerate(whole)]
        return sum(jnp.sum(part * target_RTD[r, at]) for (r, at, _), part in zip(whole, parts)), parts

    (_, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return batch, [(r, at, part) for (r, at, _), part in zip(whole, parts)], gradients


@pytest.mark.parametrize(
    ("remat", "attention"),
    [(False, "xla"), (True, "xla"), pytest.param(True, "splash", marks=pytest.mark.slow)],
)
def test_shared_prompts_give_the_plain_hidden_states_and_gradients(tiny, plain, remat, attention, monkeypatch):
    monkeypatch.setattr(_kernels, "splash_attention", partial(splash_attention, interpret=True))
    monkeypatch.setattr(_packed, "plan_packed", partial(plan_packed, interpret=True))
    batch, parts, expected = plain
    graphdef, _ = abstract(TINY, remat=remat, attention=attention)

    def loss(params):
        hidden = merge(graphdef, params).with_prompts(*map(jnp.asarray, batch))
        return jnp.sum(hidden * target(batch[2].shape) * (batch[4] > 0)[..., None]), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny[1])
    for r, at, part in parts:
        np.testing.assert_allclose(hidden[r, at], part, atol=5e-6)
    # Of hundreds of tokens float32 rounds more away, in one span as in four. jax 0.12 leaves 1.2e-6 of a short batch.
    assert relative(gradients, expected) <= (2e-6 if batch[2].shape[1] < 100 else 4e-6)


@pytest.mark.parametrize(("stretch", "queries"), [(1, 6), (22, 66), (44, 66)])
def test_queries_of_long_blocks_attend_in_spans(tiny, stretch, queries):
    graphdef, params = tiny
    batch, _ = packed(stretch)
    forward = jax.jit(lambda params, *batch: merge(graphdef, params).with_prompts(*batch))
    rows = queries * TINY.query_heads // TINY.kv_heads
    # Each span's logits, against the prompt and the row as far as the span's own end, and no others.
    spans = range(queries, 12 * stretch + 1, queries)
    expected = {f"tensor<3x{TINY.kv_heads}x{rows}x{9 + end}xf32>" for end in spans}
    program = forward.lower(params, *batch).as_text()
    products = re.findall(r"stablehlo.dot_general .* -> (tensor<3x\d+x\d+x\d+xf32>)", program)
    assert {product for product in products if not product.endswith(f"x{TINY.head_size}xf32>")} == expected


def test_a_row_of_one_prompt_is_the_same_in_any_number_of_blocks(tiny):
    graphdef, params = tiny
    (prompt_PT, length_P, *packed_rows), _ = packed()
    tokens_RT, positions_RT, segment_RT, prompt_RC = (jnp.asarray(rows[1:]) for rows in packed_rows)
    model = merge(graphdef, params)

    def hidden(blocks):
        one_prompt_RC = prompt_RC[:, :1].repeat(blocks, axis=1)
        return model.with_prompts(
            jnp.asarray(prompt_PT), jnp.asarray(length_P), tokens_RT, positions_RT, segment_RT, one_prompt_RC
        )

    live = (segment_RT > 0)[..., None]
    one = hidden(1) * live
    np.testing.assert_allclose(hidden(2) * live, one, atol=2e-6)
    np.testing.assert_allclose(hidden(4) * live, one, atol=2e-6)
    with pytest.raises(SamplerError, match="divide its length 12: got prompt_RC with 5"):
        hidden(5)


def test_shared_prompts_look_their_angles_up(tiny):
    graphdef, params = tiny
    batch = [jnp.asarray(array) for array in packed()[0]]
    forward = jax.jit(lambda params, *batch: merge(graphdef, params).with_prompts(*batch))
    # XLA on CPUs would compute angles anew for every head that is turned: a tenth of a small update.
    assert "cosine" not in forward.lower(params, *batch).as_text()
    cos, sin = rope_constants(40, TINY)
    for table, computed in zip((cos, sin), rope_tables(jnp.arange(40), TINY)):
        np.testing.assert_allclose(table[:40], computed, atol=2e-7)
    np.testing.assert_allclose(cos[:40, 0], np.cos(np.arange(40.0)), atol=1e-7)
    # A position that no packed row has is loud, not another position's angle.
    batch[3] = batch[3] + 1000
    assert np.isnan(forward(params, *batch)[batch[4] > 0]).all()


def test_blocks_of_rows_that_keep_to_their_own_prompts(tiny):
    graphdef, params = tiny
    batch, _ = packed()
    slots = len(batch[0])
    twice = [jnp.concatenate([array, array]) for array in batch]
    twice[5] = jnp.concatenate([batch[5], batch[5] + slots])
    model = merge(graphdef, params)
    np.testing.assert_array_equal(model.with_prompts(*twice, shards=2), model.with_prompts(*twice))
    with pytest.raises(SamplerError, match="shards=3"):
        model.with_prompts(*twice, shards=3)


def test_what_stands_in_padding_changes_nothing(tiny):
    graphdef, params = tiny
    batch, _ = packed()
    prompt_PT, length_P, tokens_RT, positions_RT, segment_RT, prompt_RC = batch
    other = (
        np.where(np.arange(9) < length_P[:, None], prompt_PT, 5), length_P,
        np.where(segment_RT > 0, tokens_RT, 9), np.where(segment_RT > 0, positions_RT, 77), segment_RT, prompt_RC,
    )  # fmt: skip
    run = jax.jit(lambda params, *batch: merge(graphdef, params).with_prompts(*batch))
    first, second = run(params, *batch), run(params, *other)
    assert np.array_equal(first[segment_RT > 0], second[segment_RT > 0])
    assert np.isfinite(first).all()


def test_packed_rows_are_their_segments(tiny):
    graphdef, params = tiny
    model = jax.jit(lambda *inputs: merge(graphdef, params)(*inputs))
    tokens = np.random.default_rng(3).integers(0, 61, (1, 14)).astype(np.int32)
    segment = np.asarray([[1] * 6 + [2] * 5 + [0] * 3], np.int32)
    positions = np.asarray([[*range(6), *range(5), 0, 0, 0]], np.int32)
    hidden = model(tokens, positions, segment)
    np.testing.assert_allclose(hidden[:, :6], model(tokens[:, :6]), atol=2e-6)
    np.testing.assert_allclose(hidden[:, 6:11], model(tokens[:, 6:11]), atol=2e-6)


def test_bf16_computes_in_bf16_with_float32_sums(tiny):
    _, params = tiny
    tokens = np.random.default_rng(3).integers(0, 61, (2, 14)).astype(np.int32)
    exact = merge(abstract(TINY)[0], params)(jnp.asarray(tokens))
    low = merge(abstract(TINY, compute_dtype=jnp.bfloat16)[0], params)(jnp.asarray(tokens))
    assert low.dtype == jnp.bfloat16
    assert 1e-4 < float(jnp.sqrt(jnp.mean(jnp.square(low - exact)))) < 0.05


def test_split_and_merge_keep_names_and_identity(tiny):
    graphdef, params = tiny
    assert set(params) == {"embed", "final_norm", "layers"}
    assert set(params["layers"]) == {
        "attn_norm", "mlp_norm", "q", "k", "v", "o", "q_norm", "k_norm", "gate", "up", "down",
    }  # fmt: skip
    assert params["layers"]["q"].shape == (3, 32, 4, 8)
    again, shapes = abstract(TINY)
    assert again == graphdef
    assert hash(again) == hash(graphdef)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert merge(graphdef, params).unembedding is params["embed"]


def test_untied_models_have_their_own_unembedding():
    _, params = abstract(ModelConfig("llama", 61, 32, 48, 2, 4, 4, 8))
    assert params["unembed"].shape == (61, 32)


def test_auto_attention_is_readable_and_refusals_are_named():
    assert Transformer(TINY, rngs=nnx.Rngs(0)).attention == "xla"
    assert resolve_attention("cudnn", TINY, jnp.dtype(jnp.bfloat16), None) == "cudnn"
    with pytest.raises(SamplerError, match=r"compute_dtype bfloat16 or float16 .*float32"):
        resolve_attention("cudnn", TINY, jnp.dtype(jnp.float32), None)
    with pytest.raises(SamplerError, match=r"one of auto, xla, cudnn, splash: got 'flash'"):
        resolve_attention("flash", TINY, jnp.dtype(jnp.float32), None)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_splash_computes_the_same_attention(heads):
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(random.standard_normal((2, 130, n, 64)), jnp.float32) for n in (heads[0], heads[1], heads[1])
    )
    at = np.arange(130)
    segment = jnp.asarray(np.stack([np.where(at < 50, 1, np.where(at < 120, 2, 0)), np.ones(130)]), jnp.int32)
    expected = self_attention("xla", q, k, v, segment)
    np.testing.assert_allclose(splash_attention(q, k, v, segment, interpret=True), expected, atol=3e-6)


def _jaxprs(value):
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _jaxprs(value.jaxpr)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _jaxprs(part)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in _jaxprs(parameter):
                yield from _equations(inner)


def _product_flops(equation):
    """2 times the elements of a matrix product's result times the length that it sums over."""
    (axes, _), _ = equation.params["dimension_numbers"]
    summed = math.prod(equation.invars[0].aval.shape[axis] for axis in axes)
    return 2 * summed * math.prod(equation.outvars[0].aval.shape)


@pytest.mark.parametrize("length", [100, 300, 700])
def test_splash_flops_are_the_products_of_its_kernels(length):
    """Counted in the kernels of a gradient: products per tile, times the tiles of the grid, half of them causal."""
    rows, heads, size = 2, 3, 64
    q = jnp.zeros((rows, length, heads, size))
    segment = jnp.ones((rows, length), jnp.int32)
    loss = jax.grad(lambda q, k, v: splash_attention(q, k, v, segment, interpret=True).sum(), argnums=(0, 1, 2))
    counted = {}
    for equation in _equations(jax.make_jaxpr(loss)(q, q, q).jaxpr):
        if equation.primitive.name == "pallas_call":
            products = [e for e in _equations(equation.params["jaxpr"]) if e.primitive.name == "dot_general"]
            name = equation.params["name"]
            counted[name] = sum(map(_product_flops, products)) * math.prod(equation.params["grid_mapping"].grid)
    assert len(counted) == 3
    for name, flops in counted.items():
        assert splash_flops(name, rows=rows, heads=heads, head_size=size, length=length) == flops / 2
    for other in ("another_kernel", "packed_attention_fwd", "packed_attention_prompt_dkv"):
        assert splash_flops(other, rows=rows, heads=heads, head_size=size, length=length) == 0
