"""GRPO on the numbers game Countdown."""
