"""Policies on held-out problems: greedy and sampled answers, their records, and how sure the figures are."""
