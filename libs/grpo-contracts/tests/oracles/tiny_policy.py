"""A random policy small enough to roll out anywhere, its tokenizer, and log-probabilities computed without padding."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqr"]
PAD, EOS = 0, 1
STOP = (EOS, 9, 12)  # more than one, as Qwen has it
PROMPTS = ["a b c d e", "f", "g h i"]


def make_tokenizer():
    """One id a letter; pad and eos are different ids, as the checkpoints of this field have it."""
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def make_policy():
    """Two layers of width 32 in float32; the weights are large enough that no distribution is close to uniform."""
    torch.manual_seed(3)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=len(WORDS), num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.3,
        pad_token_id=PAD, eos_token_id=EOS, **size,
    )  # fmt: skip
    policy = Qwen2ForCausalLM(config).float()
    policy.generation_config.eos_token_id = list(STOP)
    return policy


def _sampling(logits, temperature, top_k):
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.log_softmax(-1)


@torch.no_grad()
def draw(policy, prompt, most, *, temperature, top_k):
    """One completion with its log-probabilities after temperature and filter, as a server returns them."""
    policy.eval()
    drawn = policy.generate(
        torch.tensor([prompt]), do_sample=True, temperature=temperature, top_k=top_k, top_p=1.0, max_new_tokens=most,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = drawn.sequences[0, len(prompt) :].tolist()
    logp = [_sampling(logits[0], temperature, top_k)[token].item() for logits, token in zip(drawn.logits, ids)]
    return ids, logp


@torch.no_grad()
def logp_alone(policy, prompt, completion, *, temperature=1.0, top_k=0):
    """Log-probability of each token of one completion, from a forward over this one unpadded row."""
    policy.eval()
    logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return _sampling(logits.double(), temperature, top_k)[
        torch.arange(len(completion)), torch.tensor(completion)
    ].tolist()
