"""Scoring completions, and the processes that run other people's reward functions.

Nothing is imported here: a reward process starts from this package, and must start fast.
"""
