"""The policy network and the rollout engine: exact log-probabilities, fast decoding, in JAX."""

from grpo_sampler._config import Llama3Scaling, ModelConfig
from grpo_sampler._errors import SamplerError, UnsupportedModelError, WeightsError
from grpo_sampler._network import Transformer, abstract, merge, split
from grpo_sampler._weights import load, save

__all__ = [
    "Llama3Scaling",
    "ModelConfig",
    "SamplerError",
    "Transformer",
    "UnsupportedModelError",
    "WeightsError",
    "abstract",
    "load",
    "merge",
    "save",
    "split",
]
