"""An evaluation by PyTorch and transformers alone, beside the records of ours, problem by problem.

    hatch run models:second-opinion FOLDER RECORDS [--problems 100] [--system TEXT] [--examples FILE.jsonl] ...

FOLDER is a policy in Hugging Face layout, as `export` writes it; RECORDS is what `eval FOLDER` wrote. Prompts are made
anew by the chat template in transformers, decoding is `generate`, and answers are read by the published rules of two
other programs. Nothing of grpo-* is imported. Exits with 1 if a verdict differs on answers of the same text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")  # openai/grade-school-math, dataset.py
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # lm-evaluation-harness, gsm8k.yaml, `flexible-extract`


def number(text: str) -> Decimal | None:
    """A number as those two programs clean it: without commas, dollars and a last full stop."""
    try:
        return Decimal(re.sub(r"[,$]|\.$", "", text))
    except InvalidOperation:
        return None


def strict(text: str) -> Decimal | None:
    """What follows the first mark."""
    found = STRICT.search(text)
    return number(found[1]) if found else None


def flexible(text: str) -> Decimal | None:
    """The last number."""
    found = FLEXIBLE.findall(text)
    return number("".join(found[-1])) if found else None


def main() -> int:
    """Decode, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("records", type=Path, metavar="RECORDS")
    parser.add_argument("--problems", type=int, default=100, help="so many, from the first one")
    parser.add_argument("--new-tokens", type=int, default=96, help="limit of an answer, as in the evaluation")
    parser.add_argument("--system", default="", help="prompt.system of the evaluation")
    parser.add_argument("--instruction", default="", help="prompt.instruction, which follows the question")
    parser.add_argument("--examples", type=Path, help="JSONL file of the solved problems that were shown first")
    options = parser.parse_args()

    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    records = [json.loads(line) for line in options.records.read_text().splitlines()[: options.problems]]
    examples = options.examples.read_text().splitlines() if options.examples else []
    shown = [(example["question"], example["answer"]) for example in map(json.loads, examples)]

    def ask(question: str) -> dict[str, str]:
        return {"role": "user", "content": f"{question}\n\n{options.instruction}" if options.instruction else question}

    agreed = dict.fromkeys(["text", "strict", "lenient"], 0)
    right = {rule: {"there": 0, "here": 0} for rule in ("strict", "lenient")}
    misread = 0
    for done, record in enumerate(records, 1):
        turns = [{"role": "system", "content": options.system}] if options.system else []
        for question, answer in shown:
            turns += [ask(question), {"role": "assistant", "content": answer}]
        turns.append(ask(record["question"]))
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = prompt["input_ids"].shape[1]
        if length != record["prompt_tokens"]:
            sys.exit(
                f"problem {record['problem']}: its prompt has {length} tokens here, {record['prompt_tokens']} there"
            )
        with torch.no_grad():
            out = model.generate(
                **prompt,
                do_sample=False,
                max_new_tokens=options.new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences[0, length:].tolist()
        text = tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, clean_up_tokenization_spaces=False)
        ours, gold = record["greedy"], strict(record["gold"])
        judged = ours["judgement"]
        here = {"strict": strict(text) == gold, "lenient": flexible(text) == gold}
        same = text == ours["completion"]
        agreed["text"] += same
        for rule, verdict in here.items():
            agreed[rule] += verdict == judged[rule]
            right[rule]["there"] += judged[rule]
            right[rule]["here"] += verdict
            if verdict != judged[rule]:
                misread += same
                print(f"problem {record['problem']}: {rule} {judged[rule]} there, {verdict} here: {text!r}", flush=True)
        if not same:
            theirs = tokenizer(ours["completion"], add_special_tokens=False)["input_ids"]
            at = next((n for n, pair in enumerate(zip(ids, theirs)) if len(set(pair)) > 1), min(len(ids), len(theirs)))
            best = out.logits[min(at, len(out.logits) - 1)][0].topk(2)
            words = " or ".join(repr(tokenizer.decode([token])) for token in best.indices.tolist())
            gap = float(best.values[0] - best.values[1])
            print(
                f"problem {record['problem']}: another text from token {at} on, where {words} is best by {gap:.1e}:\n"
                f"  there {ours['completion']!r}\n  here  {text!r}",
                flush=True,
            )
        if not done % 10 or done == len(records):
            print(f"{done} problems: agreed {json.dumps(agreed)}, right {json.dumps(right)}", flush=True)
    return 1 if misread else 0


if __name__ == "__main__":
    sys.exit(main())
