"""Which prompts are held out: a hash of their text decides, so no seed, order or file can bring one into training."""

from __future__ import annotations

import hashlib


def held_out_share(text: str) -> float:
    """A number in [0, 1) by which a prompt is held out: below 0.1 lies a tenth of all texts, always the same one."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return (number % 10 + number // 10 / 429_496_730) / 10  # the last digit first: a tenth is what ends with 0
