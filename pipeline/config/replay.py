"""Whose routes the trainer takes."""

from __future__ import annotations

from enum import StrEnum


class Replay(StrEnum):
    """The kinds of router replay; docs/router-replay.md says what each is for."""

    NONE = "none"
    R2 = "r2"
    R3 = "r3"

    @property
    def from_server(self) -> bool:
        """The rollout engine's routes: its answers bring them, and every pass of the policy takes them."""
        return self is Replay.R3

    @property
    def from_proximal(self) -> bool:
        """Those of the proximal forward pass: it records them, and updates take them."""
        return self is Replay.R2

    @property
    def any(self) -> bool:
        """Whether routers are given routes at all."""
        return self is not Replay.NONE

    def of_model(self, num_experts: int) -> Replay:
        """This kind for a mixture of experts; a dense model has no routes."""
        return self if num_experts else Replay.NONE
