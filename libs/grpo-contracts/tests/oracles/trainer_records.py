"""Records as TRL and verl make them, by their own code unchanged, around a tiny policy of transformers.

A case holds the record, the keyword arguments of the adapter, and the truth: each row's prompt and completion as the
engine drew them, before any trainer padded, masked or shuffled them, with log-probabilities of a forward over that row.
"""

import asyncio
import os
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from tiny_policy import PAD, PROMPTS, STOP, WORDS, draw, logp_alone, make_policy, make_tokenizer
from trl import GRPOConfig, GRPOTrainer
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.replica import TokenOutput

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
GROUP_SIZE, NEW = 4, 10
LABELS = [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)]


def _case(record, rows, sampling, policy, *, in_loss=None, **arguments):
    prompts, completions = zip(*rows)
    settings = {name: sampling[name] for name in sampling if name != "stop_ids"}
    width = len(record["completion_ids" if "completion_ids" in record else "responses"][0])
    truth = [logp_alone(policy, *row) for row in rows]
    if settings:
        arguments["policy_logp"] = [numbers + [0.0] * (width - len(numbers)) for numbers in truth]
    return {
        "record": {k: v.numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in record.items()},
        "arguments": {
            "sampling": sampling,
            "vocab_size": len(WORDS),
            "pad_id": PAD,
            "group_size": GROUP_SIZE,
            **arguments,
        },
        "prompts": list(prompts),
        "completions": list(completions),
        "logp": [logp_alone(policy, *row, **settings) for row in rows],
        "policy_logp": truth,
        "in_loss": [True] * len(rows) if in_loss is None else in_loss,
    }


class _Spy(GRPOTrainer):
    """Keeps what the engine drew, as lists, before TRL makes tensors of it."""

    def _generate(self, prompts):
        drawn = super()._generate(prompts)
        self.drawn = list(zip(map(list, drawn[0]), map(list, drawn[1])))
        return drawn


def _trl(policy, tokenizer, **settings):
    engine = settings.pop("rollout_func", None)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=len(LABELS), num_generations=GROUP_SIZE,
        max_completion_length=NEW, num_iterations=2, report_to=[], use_cpu=True, bf16=False, seed=1, **settings,
    )  # fmt: skip
    return _Spy(
        policy,
        lambda completions, **_: [float(len(text)) for text in completions],
        config,
        Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        **({} if engine is None else {"rollout_func": engine}),
    )


def trl_cases():
    """TRL's `_generate_and_score_completions`, and the same shuffled into its buffer."""
    policy, tokenizer = make_policy(), make_tokenizer()
    inputs = [{"prompt": prompt} for prompt in LABELS]

    def engine(prompts, trainer):
        """What a server returns: log-probabilities after temperature and filter."""
        rows = [(ids, *draw(policy, ids, NEW, temperature=0.8, top_k=5)) for ids in tokenizer(prompts)["input_ids"]]
        return {
            "prompt_ids": [r[0] for r in rows],
            "completion_ids": [r[1] for r in rows],
            "logprobs": [r[2] for r in rows],
        }

    plain = {"stop_ids": STOP}
    trainer = _trl(policy, tokenizer)
    policy.train()
    record = trainer._generate_and_score_completions(inputs)
    yield "trl", _case(record, trainer.drawn, plain, policy)

    policy.train()
    record = trainer._prepare_inputs(inputs)
    texts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(record["prompt_ids"], record["prompt_mask"])]
    found = [_find(trainer.drawn, record, b) for b in range(len(texts))]
    record = {key: value for key, value in record.items() if getattr(value, "ndim", 0)}
    yield "trl, shuffled", _case(record, [trainer.drawn[b] for b in found], plain, policy, group=texts)

    trainer = _trl(policy, tokenizer, temperature=0.7, mask_truncated_completions=True)
    policy.train()
    record = trainer._generate_and_score_completions(inputs)
    ended = [completion[-1] in (*STOP, PAD) for _, completion in trainer.drawn]
    sampling = plain | {"temperature": 0.7}
    yield "trl, cool, truncated rows masked", _case(record, trainer.drawn, sampling, policy, in_loss=ended)

    trainer = _trl(policy, tokenizer, temperature=0.8, top_k=5, rollout_func=engine)
    policy.train()
    record = trainer._generate_and_score_completions(inputs)
    sampling = plain | {"temperature": 0.8, "top_k": 5}
    yield "trl, a server's log-probabilities", _case(record, trainer.drawn, sampling, policy)


def _find(drawn, record, b):
    """Which drawn row a shuffled row is; rows that are equal in everything may stand for each other."""
    row = (
        record["prompt_ids"][b][record["prompt_mask"][b].bool()].tolist(),
        record["completion_ids"][b][record["completion_mask"][b].bool()].tolist(),
    )
    return drawn.index(row)


class _Worker(AgentLoopWorker):
    """verl's worker without the cluster it would be an actor of."""

    def __init__(self, tokenizer, limits):
        self.tokenizer, self.processor = tokenizer, None
        self.rollout_config = limits
        self.reward_loop_worker_handles, self.distillation_enabled = None, False

    def _get_mm_processor_kwargs(self, audios):
        return {}


class _Loop(SingleTurnAgentLoop):
    """verl's loop of one turn around an engine of ours, without chat templates."""

    def __init__(self, limits, engine):
        self.rollout_config, self.server_manager = limits, self
        self.prompt_length, self.response_length = limits.prompt_length, limits.response_length
        self.processor, self.mm_processor_kwargs, self.engine = None, {}, engine

    async def ct_build_initial_tokens(self, messages, **media):
        return messages

    async def generate(self, *, prompt_ids, **request):
        token_ids, log_probs = self.engine(prompt_ids)
        return TokenOutput(token_ids=token_ids, log_probs=log_probs)

    async def ct_merge_assistant_token(self, prompt_ids, drawn, mask, logp, assistant_logprobs):
        return SimpleNamespace(token_ids=prompt_ids + drawn), [1] * len(drawn), assistant_logprobs


def verl_cases():
    """verl's agent loop, from what an engine drew to the DataProto its trainer reads."""
    policy, tokenizer = make_policy(), make_tokenizer()
    yield "verl", _verl(policy, tokenizer, NEW)
    yield "verl, cut short", _verl(policy, tokenizer, 3)  # an engine that goes on past the limit


def _verl(policy, tokenizer, response_length):
    limits = SimpleNamespace(prompt_length=7, response_length=response_length)
    sampling, rows = {"temperature": 0.8, "top_k": 5}, []

    def engine(ids):
        completion, logp = draw(policy, ids, NEW, **sampling)
        rows.append((ids, completion[:response_length]))
        return completion, logp

    worker, loop = _Worker(tokenizer, limits), _Loop(limits, engine)

    async def run(ids):
        output = await loop.run({}, raw_prompt=ids)
        output.reward_score = float(len(output.response_ids))
        return await worker._agent_loop_postprocess(output, False, raw_prompt=None)

    async def run_all(labels):
        return [await run(tokenizer(label)["input_ids"]) for label in labels]

    order = [5, 0, 9, 3, 1, 11, 4, 2, 8, 6, 7, 10]  # rows come back as requests end
    uid = np.array([LABELS[i] for i in order], object)
    data = worker._postprocess(asyncio.run(run_all(uid)), {"uid": uid})
    record = {**data.batch, "uid": data.non_tensor_batch["uid"]}
    return _case(record, rows, sampling | {"stop_ids": STOP}, policy)
