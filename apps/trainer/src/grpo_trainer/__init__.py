"""GRPO for any task: four libraries assembled into one trainer."""
