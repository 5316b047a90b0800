"""What a GRPO batch is: typed stages, validation and a file format. numpy only."""

from ._adapters import from_trl, from_verl
from ._completions import from_completions
from ._errors import ContractError, GrpoError
from ._file import load_batch, save_batch
from ._protocols import RewardFunction, RolloutBackend
from ._provenance import FinishReason, PolicyVersion, SamplingParams
from ._schema import schema
from ._stages import Prompts, Rollout, Scored, TrainBatch
from ._validate import validate

__all__ = [
    "ContractError",
    "FinishReason",
    "GrpoError",
    "PolicyVersion",
    "Prompts",
    "RewardFunction",
    "Rollout",
    "RolloutBackend",
    "SamplingParams",
    "Scored",
    "TrainBatch",
    "from_completions",
    "from_trl",
    "from_verl",
    "load_batch",
    "save_batch",
    "schema",
    "validate",
]
