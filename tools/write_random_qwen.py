"""A checkpoint of the true Qwen2.5-0.5B shape with random weights, written by transformers itself.

    hatch run oracles:python tools/write_random_qwen.py FOLDER

Needs PyTorch. The tokenizer is the embedded policy's; its ids fit into the larger vocabulary.
"""

import shutil
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from transformers import Qwen2Config, Qwen2ForCausalLM

POLICY = Path(__file__).parents[1] / "apps/gsm8k/src/grpo_gsm8k/embedded/policy"


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POLICY / name, folder / name)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
