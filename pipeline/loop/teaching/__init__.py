"""The teacher of a run: what it is, and where it runs."""
