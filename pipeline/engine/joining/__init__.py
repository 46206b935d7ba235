"""Servers that join a run and leave it while it goes on."""
