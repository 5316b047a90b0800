"""Reading a Hugging Face config.json: every field is checked here, and what the network does not compute is refused."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_sampler._arguments import brief, check_int, check_number
from grpo_sampler._errors import SamplerError, UnsupportedModelError

ARCHITECTURES: dict[str, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# transformers' defaults for keys that an old config.json does not have.
_MAX_POSITIONS: dict[str, int] = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}
_LONGEST_FILE = 10_000_000  # bytes; published ones have about a thousand


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies, stretched for a longer context.

    Args:
        factor: how much the low frequencies are slowed down.
        low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are stretched by `factor`.
        high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` are left alone.
        original_max_positions: context length of pre-training, in tokens.

    Raises:
        SamplerError: a factor that is not positive, or a high_freq_factor that is not above low_freq_factor.

    Source: Llama 3.1, `rope_type: llama3` of transformers.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(name, getattr(self, name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise SamplerError(
                f"high_freq_factor must be above low_freq_factor: got {self.high_freq_factor} and "
                f"{self.low_freq_factor}."
            )
        check_int("original_max_positions", self.original_max_positions, 1)


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a parsed config.json.

    Args:
        config: as for `ModelConfig.from_hf`.

    Returns:
        The arguments of a `ModelConfig`.

    Raises:
        UnsupportedModelError: the model needs something that this library does not compute.
        SamplerError: a field is missing, or of another type than it must have.
    """
    if not isinstance(config, Mapping):
        raise SamplerError(f"config must be a parsed config.json: got {brief(config)}.")
    family = config.get("model_type")
    if family not in list(ARCHITECTURES):
        raise UnsupportedModelError(
            f"model_type must be one of {', '.join(ARCHITECTURES)}: got {brief(family)}. No other is supported."
        )
    _refuse_unsupported(config)
    sizes = {
        ours: _integer(config, theirs)
        for ours, theirs in (
            ("vocab_size", "vocab_size"),
            ("width", "hidden_size"),
            ("mlp_width", "intermediate_size"),
            ("layers", "num_hidden_layers"),
            ("query_heads", "num_attention_heads"),
        )
    }
    # Qwen3's head size is independent of the width and defaults to 128; in other families it divides the width.
    head_size = 128 if family == "qwen3" else sizes["width"] // sizes["query_heads"]
    rope_theta, rope_scaling = _read_rope(config)
    eos, heads = config.get("eos_token_id"), config.get("num_key_value_heads")
    return sizes | {
        "family": family,
        # An old file has no such keys, and null means the same.
        "kv_heads": sizes["query_heads"] if heads is None else _integer(config, "num_key_value_heads"),
        "head_size": head_size if config.get("head_dim") is None else _integer(config, "head_dim"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": check_number("config.json's rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        "tied": _boolean(config, "tie_word_embeddings"),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "max_positions": _integer(config, "max_position_embeddings", _MAX_POSITIONS[family]),
        "bos_id": None if config.get("bos_token_id") is None else _integer(config, "bos_token_id", least=0),
        "eos_ids": tuple(
            check_int("config.json's eos_token_id", token, 0)
            for token in ([] if eos is None else eos if isinstance(eos, list | tuple) else [eos])
        ),
    }


def read_json(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Reads a config.json, or the one in a folder.

    Args:
        path: the file, or the folder that contains it.

    Returns:
        The JSON object.

    Raises:
        SamplerError: there is no such file, it cannot be read, or it does not contain a JSON object.
    """
    if not isinstance(path, str | os.PathLike):
        raise SamplerError(f"path must be a file or a folder: got {brief(path)}.")
    file = Path(path)
    try:
        file = file / "config.json" if file.is_dir() else file
        if not file.exists():
            raise SamplerError(f"{file} must exist: a Hugging Face model folder contains a config.json.")
        if not file.is_file():
            raise SamplerError(f"{file} must be a file: it is a folder or a device.")
        if (size := file.stat().st_size) > _LONGEST_FILE:
            raise SamplerError(f"{file} must have at most {_LONGEST_FILE:,} bytes: got {size:,}.")
        text = file.read_bytes()
    except OSError as error:
        raise SamplerError(f"{brief(str(file))} cannot be read: {error.strerror}.") from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplerError(f"{file} must be JSON: {error}.") from error
    if not isinstance(config, dict):
        raise SamplerError(f"{file} must contain a JSON object: got {type(config).__name__}.")
    return config


def _integer(config: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
    return check_int(f"config.json's {name}", config.get(name, default), least)


def _boolean(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool | None):
        raise SamplerError(f"config.json's {name} must be true or false: got {brief(value)}.")
    return bool(value)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuses whatever would change the numbers and is not implemented in the network."""
    family = config["model_type"]
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act must be 'silu': got {brief(activation)}.")
    for name in ("attention_bias", "mlp_bias"):
        if _boolean(config, name):
            raise UnsupportedModelError(
                f"{name} must be false for {family}: got true. "
                "It adds a bias to projections that have none in this network."
            )
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list | tuple):
        raise SamplerError(f"config.json's layer_types must be a list: got {brief(layer_types)}.")
    odd = sorted({brief(kind) for kind in layer_types if kind != "full_attention"})
    if odd:
        raise UnsupportedModelError(f"layer_types must all be 'full_attention': got {', '.join(odd[:5])} among them.")
    if _boolean(config, "use_sliding_window") and config.get("sliding_window") is not None and not layer_types:
        first = _integer(config, "max_window_layers", 28, least=0)
        if first < _integer(config, "num_hidden_layers"):
            raise UnsupportedModelError(
                f"use_sliding_window must be false: got a window of {brief(config['sliding_window'])} tokens "
                f"from layer {first} on. Sliding-window attention is not supported."
            )
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor must be 1: got {brief(config['partial_rotary_factor'])}.")
    if config.get("quantization_config"):
        raise UnsupportedModelError("quantization_config must be absent: quantized weights are not supported.")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from a config.json of transformers 4 or 5."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if not isinstance(given, Mapping | None):
            raise SamplerError(f"config.json's {name} must be an object or null: got {brief(given)}.")
        rope |= given or {}
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise UnsupportedModelError(
            f"rope_parameters must be the same for all layers: got some for {brief(nested[0])}."
        )
    theta = check_number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor must be 1: got {brief(rope['partial_rotary_factor'])}.")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type must be 'default' or 'llama3': got {brief(kind)}.")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise SamplerError(f"rope_type 'llama3' must come with {', '.join(names)}: {', '.join(missing)} missing.")
    original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    factor, low, high = (check_number(f"rope_scaling's {name}", rope[name]) for name in names)
    return theta, Llama3Scaling(factor, low, high, check_int("original_max_position_embeddings", original, 1))
