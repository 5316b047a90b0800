"""What a GRPO batch is: typed stages, validation and a file format. numpy only."""

from ._adapters import from_trl, from_verl
from ._completions import from_completions
from ._errors import ContractError, GrpoError
from ._file import load, save
from ._protocols import AdvantageEstimator, PolicyUpdate, RewardFunction, RolloutBackend
from ._schema import schema
from ._stages import FinishReason, PolicyIdentity, Prompts, Rollout, SamplingLaw, Scored, TrainBatch
from ._validate import validate

__all__ = [
    "AdvantageEstimator",
    "ContractError",
    "FinishReason",
    "GrpoError",
    "PolicyIdentity",
    "PolicyUpdate",
    "Prompts",
    "RewardFunction",
    "Rollout",
    "RolloutBackend",
    "SamplingLaw",
    "Scored",
    "TrainBatch",
    "from_completions",
    "from_trl",
    "from_verl",
    "load",
    "save",
    "schema",
    "validate",
]
