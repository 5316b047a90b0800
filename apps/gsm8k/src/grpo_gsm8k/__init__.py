"""GSM8K as a task of grpo-trainer."""
