"""The GSM8K trainer."""
