"""Servers that join and leave a run: what it does about them, and how one is started for it."""
