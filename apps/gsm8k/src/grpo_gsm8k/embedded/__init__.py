"""The embedded demo: generated word problems and a policy small enough for a laptop."""
