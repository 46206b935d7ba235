"""Conversations at an address that any OpenAI-compatible program can talk to."""

from pipeline.environments.endpoint.listener import Address, serve
from pipeline.environments.endpoint.subprogram import ProgramError, run_program

__all__ = ["Address", "ProgramError", "run_program", "serve"]
