"""Scoring completions, and the processes that run other people's reward functions."""
