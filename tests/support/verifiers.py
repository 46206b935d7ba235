"""Verifiers of a user's own, for runs too short to learn what the task asks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib


def length(prompt, response_text, response_ids, finish_reason):
    """Tokens of the response, in units of ten."""
    return len(response_ids) / 10


def unruly(prompt, response_text, response_ids, finish_reason):
    """By the answer's tokens: ends its process in two ways, hangs, leaves a child behind, or prints; else `length`."""
    kind = int(sum(response_ids)) % 6
    if kind == 0:
        sys.exit(0)
    if kind == 1:
        os._exit(0)
    if kind == 2:
        time.sleep(600)
    if kind == 3:
        subprocess.Popen(["sleep", "600"])
    if kind == 4:
        print("noise\n" * 1000)
    return len(response_ids) / 10


def evens(prompt, response_text, response_ids, finish_reason):
    """Share of the answer's tokens that have an even id; raises for one answer of twenty, by its tokens."""
    ids = [int(token) for token in response_ids]
    if zlib.crc32(bytes(ids)) % 20 == 0:
        raise ValueError("one answer of twenty")
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


def share_of_evens(prompt, response_text, response_ids, finish_reason):
    """Share of the answer's tokens that have an even id."""
    return sum(int(token) % 2 == 0 for token in response_ids) / max(1, len(response_ids))
