"""From settings to a run: shapes first, then weights and data."""
