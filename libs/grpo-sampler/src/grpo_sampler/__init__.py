"""The policy network and the rollout engine: exact log-probabilities, fast decoding, in JAX."""

from grpo_sampler._backend import SamplerBackend
from grpo_sampler._completions import FinishedSequence
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import SamplerError, UnsupportedModelError, WeightsError
from grpo_sampler._kernels import splash_flops
from grpo_sampler._lora import LoRA, init_adapters, join_adapters, merge_adapters, split_adapters
from grpo_sampler._network import Transformer, abstract, merge, split
from grpo_sampler._partition import PADDED_AXES, PARTITION_AXES, PARTITION_RULES, decoding_sizes
from grpo_sampler._peft import load_adapters, save_adapters
from grpo_sampler._read_config import Llama3Scaling
from grpo_sampler._sampler import Sampler
from grpo_sampler._sampling import log_probabilities
from grpo_sampler._weights import load_pretrained, save_pretrained

__all__ = [
    "PADDED_AXES",
    "PARTITION_AXES",
    "PARTITION_RULES",
    "FinishedSequence",
    "Llama3Scaling",
    "LoRA",
    "ModelConfig",
    "Sampler",
    "SamplerBackend",
    "SamplerError",
    "Transformer",
    "UnsupportedModelError",
    "WeightsError",
    "abstract",
    "decoding_sizes",
    "init_adapters",
    "join_adapters",
    "load_adapters",
    "load_pretrained",
    "log_probabilities",
    "merge",
    "merge_adapters",
    "save_adapters",
    "save_pretrained",
    "splash_flops",
    "split",
    "split_adapters",
]
