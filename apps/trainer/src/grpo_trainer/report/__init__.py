"""The page that shows a run, and the second look at a step that failed."""
