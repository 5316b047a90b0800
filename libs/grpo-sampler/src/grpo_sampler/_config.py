"""What a model is: the fields of a Hugging Face config.json that determine the computation."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from grpo_sampler._arguments import brief, check_int, check_number
from grpo_sampler._errors import SamplerError, UnsupportedModelError
from grpo_sampler._lora import LoRA
from grpo_sampler._read_config import ARCHITECTURES, Llama3Scaling, read_config, read_json

Family = Literal["qwen2", "qwen3", "llama"]

# Far above every published model: beyond them a size is a mistake, which would otherwise be met as memory that grows.
_MOST: dict[str, int] = {
    "vocab_size": 2**22,
    "width": 2**17,
    "mlp_width": 2**20,
    "layers": 1000,
    "query_heads": 2**12,
    "kv_heads": 2**12,
    "head_size": 2**12,
    "max_positions": 2**31 - 1,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer of the Qwen2, Qwen3 or Llama 3 family.

    Args:
        family: `qwen2` (Qwen2 and Qwen2.5), `qwen3` or `llama`; determines the names in the Hugging Face layout.
        vocab_size: rows of the embedding.
        width: size of the residual stream.
        mlp_width: size of the gated MLP's hidden layer.
        layers: number of blocks.
        query_heads: attention heads; a multiple of `kv_heads`.
        kv_heads: key/value heads.
        head_size: size of one head, even.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: stretched rotary frequencies, or None.
        norm_eps: added to the mean square in every RMS norm.
        tied: the unembedding is the embedding.
        qkv_bias: q, k and v projections have a bias.
        qk_norm: queries and keys pass through an RMS norm over the head before the rotation.
        max_positions: longest context that the model was trained for, in tokens.
        bos_id: first token of every text, or None.
        eos_ids: tokens that end a text.
        lora: low-rank adapters, or None. No config.json holds them: `dataclasses.replace(config, lora=LoRA(...))`.

    Raises:
        SamplerError: values of another type, out of range, or not compatible.
    """

    family: Family
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32768
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.family not in list(ARCHITECTURES):
            raise UnsupportedModelError(f"family must be one of {', '.join(ARCHITECTURES)}: got {brief(self.family)}.")
        for name, most in _MOST.items():
            check_int(name, getattr(self, name), 1, most)
        for name in ("rope_theta", "norm_eps"):
            check_number(name, getattr(self, name))
        for name in ("tied", "qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise SamplerError(f"{name} must be True or False: got {brief(getattr(self, name))}.")
        if not isinstance(self.rope_scaling, Llama3Scaling | None):
            raise SamplerError(f"rope_scaling must be a Llama3Scaling or None: got {brief(self.rope_scaling)}.")
        if not isinstance(self.eos_ids, tuple):
            raise SamplerError(f"eos_ids must be a tuple of token ids: got {brief(self.eos_ids)}.")
        for token in (*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])):
            check_int("bos_id and each of eos_ids", token, 0)
        if self.query_heads % self.kv_heads:
            raise SamplerError(
                f"query_heads must be a multiple of kv_heads: got {self.query_heads} and {self.kv_heads}."
            )
        if self.head_size % 2:
            raise SamplerError(f"head_size must be even, because rotary positions turn pairs: got {self.head_size}.")
        expected = {"qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)}[self.family]
        if (self.qkv_bias, self.qk_norm) != expected:
            raise SamplerError(
                f"family {self.family} must have qkv_bias, qk_norm = {expected}: "
                f"got {(self.qkv_bias, self.qk_norm)}. No Hugging Face layout holds this mixture."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed config.json.

        Args:
            config: the dictionary; `rope_theta` and `rope_scaling` at the top level (transformers 4) or in
                `rope_parameters` (transformers 5).

        Returns:
            The configuration.

        Raises:
            UnsupportedModelError: the model needs something that this library does not compute.
            SamplerError: a field is missing, of another type or out of range.
        """
        return cls(**read_config(config))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a config.json, or the one in a folder.

        Args:
            path: the file, or the folder that contains it.

        Returns:
            The configuration.

        Raises:
            UnsupportedModelError: see `from_hf`.
            SamplerError: there is no such file, it cannot be read, or it does not contain a JSON object.
        """
        return cls.from_hf(read_json(path))

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of a config.json for transformers 4 and 5.

        Args:
            dtype: name of the parameters' type, such as `bfloat16`.

        Returns:
            A dictionary, ready for JSON.
        """
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_positions,
            }
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "dtype": dtype,
            "torch_dtype": dtype,  # the name in transformers 4
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
        }
        if self.family == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        else:
            config["use_sliding_window"] = False
            if self.family == "qwen3":
                config["attention_bias"] = False
        return config


def check_config(config: Any) -> None:
    """Raises a SamplerError unless the argument is a model's configuration."""
    if not isinstance(config, ModelConfig):
        raise SamplerError(
            f"config must be a ModelConfig: got {brief(config)}. "
            "Take the one that `load_pretrained` returns, or use ModelConfig.from_hf or ModelConfig.from_file."
        )
