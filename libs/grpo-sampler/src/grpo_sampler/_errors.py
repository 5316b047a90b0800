"""What this library raises."""

from grpo_contracts import GrpoError


class SamplerError(GrpoError, ValueError):
    """An argument of the network or of the engine that cannot be met."""


class UnsupportedModelError(SamplerError):
    """A config.json that asks for an architecture this library does not have."""


class WeightsError(SamplerError):
    """A checkpoint that does not hold the tensors its config.json promises."""
