"""The network against transformers' own models, in float32 and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from make_reference import CASES, inputs, logits, make_model

from grpo_sampler import abstract, load_pretrained, merge, save_pretrained

F32_BOUND = 1e-4


def our_logits(folder, tokens_BT, *args, dtype=jnp.float32):
    config, params = load_pretrained(folder, dtype=dtype)
    graphdef, _ = abstract(config, param_dtype=dtype)

    def run(params, *arguments):
        model = merge(graphdef, params)
        return jnp.einsum("BTD,VD->BTV", model(*arguments), model.unembedding, preferred_element_type=jnp.float32)

    return np.asarray(jax.jit(run)(params, tokens_BT, *args))


@pytest.fixture(params=list(CASES))
def case(request, tmp_path):
    model = make_model(request.param)
    model.save_pretrained(tmp_path)
    return request.param, model, tmp_path


def report(record_property, name, **errors):
    for what, value in errors.items():
        record_property(f"{name} {what}", float(value))
        print(f"{name:26s} {what:16s} {value:.2e}")


def test_right_padded_f32(case, record_property):
    name, model, folder = case
    tokens_BT, lengths = inputs(model.config.vocab_size)
    live = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    ours = our_logits(folder, tokens_BT, None, live.astype(np.int32)) * live[..., None]
    error = np.abs(ours - logits(model, tokens_BT, lengths)).max()
    report(record_property, name, padded_f32=error)
    assert error <= F32_BOUND


def test_packed_f32(case, record_property):
    name, model, folder = case
    tokens_BT, lengths = inputs(model.config.vocab_size)
    row = np.concatenate([tokens_BT[b, :n] for b, n in enumerate(lengths)] + [np.zeros(3, np.int32)])[None]
    segment = np.concatenate([np.full(n, b + 1) for b, n in enumerate(lengths)] + [np.zeros(3)]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(3)]).astype(np.int32)[None]
    ours = our_logits(folder, row, positions, segment)[0]
    theirs = np.concatenate(
        [logits(model, tokens_BT[b : b + 1, :n], np.asarray([n]))[0] for b, n in enumerate(lengths)]
    )
    error = np.abs(ours[:-3] - theirs).max()
    report(record_property, name, packed_f32=error)
    assert error <= F32_BOUND


def test_bf16_within_transformers_own_spread(case, record_property):
    name, model, folder = case
    tokens_BT, lengths = inputs(model.config.vocab_size)
    live = np.arange(tokens_BT.shape[1]) < lengths[:, None]
    low = model.to(torch.bfloat16)
    theirs = logits(low, tokens_BT, lengths)
    exact = logits(low.float(), tokens_BT, lengths)  # the rounded weights, computed in float32
    ours = our_logits(folder, tokens_BT, None, live.astype(np.int32), dtype=jnp.bfloat16) * live[..., None]
    our_rms, their_rms = (np.sqrt(np.square(got - exact)[live].mean()) for got in (ours, theirs))
    report(record_property, name, bf16_rms=our_rms, bf16_rms_hf=their_rms)
    report(record_property, name, bf16_max=np.abs(ours - exact).max(), bf16_max_hf=np.abs(theirs - exact).max())
    assert our_rms <= 1.1 * their_rms


@pytest.mark.parametrize("max_shard_bytes", [4_000_000_000, 60_000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_transformers_loads_what_we_save(case, tmp_path_factory, dtype, max_shard_bytes):
    _, model, folder = case
    config, params = load_pretrained(folder, dtype=dtype)
    saved = tmp_path_factory.mktemp("saved")
    save_pretrained(saved, config, params, max_shard_bytes=max_shard_bytes)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[jnp.dtype(dtype).name]
    expected = model.to(torch_dtype).state_dict()
    assert set(again.state_dict()) == set(expected)
    for name, value in again.state_dict().items():
        assert value.dtype == torch_dtype
        assert torch.equal(value, expected[name]), name
    old, new = model.config.to_dict(), again.config.to_dict()
    ignored = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    assert {k: v for k, v in new.items() if k in old and k not in ignored} == {
        k: v for k, v in old.items() if k not in ignored
    }
