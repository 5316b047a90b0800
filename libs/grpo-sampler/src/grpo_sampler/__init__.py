"""grpo-sampler."""
