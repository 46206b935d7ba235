"""Verifiers of a user's own, for runs too short to learn what the task asks."""

from __future__ import annotations


def length(prompt, response_text, response_ids, finish_reason):
    """Tokens of the response, in units of ten."""
    return len(response_ids) / 10
