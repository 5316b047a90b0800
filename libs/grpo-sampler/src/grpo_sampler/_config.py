"""What a model is: the fields of a Hugging Face config.json that determine the computation."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from grpo_sampler._errors import SamplerError, UnsupportedModelError
from grpo_sampler._lora import LoRA

Family = Literal["qwen2", "qwen3", "llama"]

_ARCHITECTURES: dict[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# transformers' defaults for keys that an old config.json does not have.
_MAX_POSITIONS: dict[str, int] = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies, stretched for a longer context.

    Args:
        factor: how much the low frequencies are slowed down.
        low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are stretched by `factor`.
        high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` are left alone.
        original_max_positions: context length of pre-training, in tokens.

    Source: Llama 3.1, `rope_type: llama3` of transformers.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


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
        SamplerError: sizes that are not compatible.
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
        if self.family not in _ARCHITECTURES:
            raise UnsupportedModelError(f"family must be one of {', '.join(_ARCHITECTURES)}: got {self.family!r}.")
        for name in (
            "vocab_size", "width", "mlp_width", "layers", "query_heads", "kv_heads", "head_size", "max_positions",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise SamplerError(f"{name} must be at least 1: got {getattr(self, name)}.")
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
            SamplerError: a field is missing or invalid.
        """
        family = config.get("model_type")
        if family not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"model_type must be one of {', '.join(_ARCHITECTURES)}: got {family!r}. No other is supported."
            )
        _refuse_unsupported(config)
        sizes = {}
        for ours, theirs in (
            ("vocab_size", "vocab_size"),
            ("width", "hidden_size"),
            ("mlp_width", "intermediate_size"),
            ("layers", "num_hidden_layers"),
            ("query_heads", "num_attention_heads"),
        ):
            value = config.get(theirs)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SamplerError(f"config.json must give {theirs} as an integer: got {value!r}.")
            sizes[ours] = value
        # Qwen3's head size is independent of the width and defaults to 128; in other families it divides the width.
        head_size = config.get("head_dim") or (
            128 if family == "qwen3" else sizes["width"] // max(sizes["query_heads"], 1)
        )
        rope_theta, rope_scaling = _read_rope(config)
        eos = config.get("eos_token_id")
        return cls(
            family=family,
            **sizes,
            kv_heads=config.get("num_key_value_heads") or sizes["query_heads"],
            head_size=head_size,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            max_positions=config.get("max_position_embeddings", _MAX_POSITIONS[family]),
            bos_id=config.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a config.json, or the one in a folder.

        Args:
            path: the file, or the folder that contains it.

        Returns:
            The configuration.

        Raises:
            UnsupportedModelError: see `from_hf`.
            SamplerError: there is no such file, or it does not contain a JSON object.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SamplerError(f"{file} must exist: a Hugging Face model folder contains a config.json.") from None
        except json.JSONDecodeError as error:
            raise SamplerError(f"{file} must be JSON: {error}.") from error
        if not isinstance(config, dict):
            raise SamplerError(f"{file} must contain a JSON object: got {type(config).__name__}.")
        return cls.from_hf(config)

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
            "architectures": [_ARCHITECTURES[self.family]],
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


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuses whatever would change the numbers and is not implemented in the network."""
    family = config["model_type"]
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act must be 'silu': got {activation!r}.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedModelError(
                f"{name} must be false for {family}: got {config[name]!r}. "
                "It adds a bias to projections that have none in this network."
            )
    layer_types = config.get("layer_types") or []
    odd = sorted({str(kind) for kind in layer_types} - {"full_attention"})
    if odd:
        raise UnsupportedModelError(f"layer_types must all be 'full_attention': got {', '.join(odd)} among them.")
    if config.get("use_sliding_window") and config.get("sliding_window") is not None and not layer_types:
        first = config.get("max_window_layers", 28)
        if first < config.get("num_hidden_layers", 0):
            raise UnsupportedModelError(
                f"use_sliding_window must be false: got a window of {config['sliding_window']} tokens "
                f"from layer {first} on. Sliding-window attention is not supported."
            )
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor must be 1: got {config['partial_rotary_factor']!r}.")
    if config.get("quantization_config"):
        raise UnsupportedModelError("quantization_config must be absent: quantized weights are not supported.")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from a config.json of transformers 4 or 5."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not theta > 0 or not math.isfinite(theta):
        raise SamplerError(f"rope_theta must be a positive number: got {theta!r}.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor must be 1: got {rope['partial_rotary_factor']!r}.")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type must be 'default' or 'llama3': got {kind!r}.")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in names if not isinstance(rope.get(name), int | float)]
    if missing:
        raise SamplerError(f"rope_type 'llama3' must come with {', '.join(names)}: {', '.join(missing)} missing.")
    original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    if not isinstance(original, int):
        raise SamplerError(f"original_max_position_embeddings must be an integer: got {original!r}.")
    factor, low, high = (float(rope[name]) for name in names)
    return float(theta), Llama3Scaling(factor, low, high, original)
