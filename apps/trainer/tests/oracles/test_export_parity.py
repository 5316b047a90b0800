"""An exported policy in transformers: the same logits, prompts and greedy answers, in every dtype and sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from toy import TASK, load, make_policy

from grpo_sampler import abstract, load_pretrained, merge
from grpo_trainer.assemble import Evaluator, assemble_evaluator
from grpo_trainer.evaluate.decode import evaluate
from grpo_trainer.report.export import export_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluator, Any]:
    folder = make_policy(tmp_path_factory.mktemp("policy"))
    sets = ["cpu_devices=0", "eval.problems=25", "eval.slots=8", "rollout.max_new_tokens=24", "eval.every=0"]
    evaluator = assemble_evaluator(load([], [f"model.path={folder}", *sets]), TASK)
    params = evaluator.load()
    # As after training: no weight is what the folder holds, and greedy answers end.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.15, leaf.shape), leaf.dtype), params)
    return evaluator, params


def exported(policy: tuple[Evaluator, Any], folder: Path, **more: Any) -> tuple[Path, Any, Any]:
    evaluator, params = policy
    target = folder / "policy"
    export_policy(target, params, evaluator.plan.model, evaluator.folder, card="", **more)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return target, model.eval(), transformers.AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-4), ("float16", 0.1), ("bfloat16", 0.3)])
def test_logits(policy: Any, tmp_path: Path, dtype: str | None, bound: float, max_shard_bytes: int) -> None:
    target, model, _ = exported(policy, tmp_path, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert len(list(target.glob("*.safetensors"))) == (1 if max_shard_bytes > 1e9 else len(_shards(target)))
    assert model.dtype == getattr(torch, dtype or "float32")
    tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 40)).astype(np.int32)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens_BT).long()).logits.float().numpy()
    config, params = load_pretrained(target, dtype=jnp.dtype(dtype or "float32"))
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == (dtype or "float32")
    graphdef, _ = abstract(config, param_dtype=jnp.dtype(dtype or "float32"))
    network = merge(graphdef, params)
    ours = jnp.einsum("BTD,VD->BTV", network(tokens_BT), network.unembedding, preferred_element_type=jnp.float32)
    scale = float(np.abs(theirs).max())
    print(f"{dtype}: {float(np.abs(ours - theirs).max()):.1e} of {scale:.1f}")
    assert np.abs(ours - theirs).max() <= bound * max(1.0, scale / 10)


def _shards(target: Path) -> list[str]:
    import json

    names = set(json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(names) > 1
    return sorted(names)


def test_prompts_and_greedy_answers(policy: Any, tmp_path: Path) -> None:
    """An evaluation by transformers alone agrees with ours, problem by problem."""
    evaluator, params = policy
    _, model, tokenizer = exported(policy, tmp_path)
    records = evaluate(evaluator, params).records
    for number, record in enumerate(records):
        turns = [{"role": "user", "content": record.question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        asked = evaluator.held_out.prompts
        assert prompt["input_ids"][0].tolist() == asked.tokens_PT[number, : asked.length_P[number]].tolist()
        # What ends an answer, transformers knows from the folder.
        answer = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, record.prompt_tokens :]
        found = answer.tolist()
        ended = found[-1] in evaluator.plan.greedy.stop_ids
        assert (len(found), "stop" if ended else "length") == (record.greedy.tokens, record.greedy.finish)
        text = tokenizer.decode(found[:-1] if ended else found, skip_special_tokens=False)
        assert text == record.greedy.completion
        problem = evaluator.held_out.problems[number]
        assert TASK.judge(text, problem, finished=ended) == record.greedy.judgement
    assert len({record.greedy.completion for record in records}) > 5
