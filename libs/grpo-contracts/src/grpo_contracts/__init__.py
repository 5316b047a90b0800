"""What a GRPO batch is: typed stages, validation and a file format. numpy only."""

from ._errors import ContractError, GrpoError
from ._stages import FinishReason, PolicyIdentity, Prompts, Rollout, SamplingLaw, Scored, TrainBatch
from ._validate import validate

__all__ = [
    "ContractError",
    "FinishReason",
    "GrpoError",
    "PolicyIdentity",
    "Prompts",
    "Rollout",
    "SamplingLaw",
    "Scored",
    "TrainBatch",
    "validate",
]
