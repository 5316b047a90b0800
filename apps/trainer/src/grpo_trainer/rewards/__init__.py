"""Scoring completions, and the processes that run other people's reward functions."""

from grpo_trainer.rewards.functions import RewardError
from grpo_trainer.rewards.refill import choose_groups, count_with_signal
from grpo_trainer.rewards.scoring import Rewards, Transcript, transcribe

__all__ = ["RewardError", "Rewards", "Transcript", "choose_groups", "count_with_signal", "transcribe"]
