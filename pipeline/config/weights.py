"""How weights travel to the servers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_ext.config import Frozen


class WeightsConfig(Frozen):
    """The weight stream; docs/weights.md explains it."""

    transport: Literal["auto", "distributed", "shared_memory"] = Field(
        "auto",
        description="distributed: process groups of trainer ranks and the servers. shared_memory: memory that both "
        "map, CUDA IPC on a GPU. auto: shared_memory where every server runs on the machine of trainer rank 0, "
        "and distributed to GPUs of their own",
    )
    bucket_bytes: int = Field(
        1 << 28,
        ge=1,
        description="bytes of whole tensors that a rank sends at once, at most; a larger tensor goes alone",
    )
    senders: int = Field(
        8,
        ge=1,
        description="distributed: trainer ranks that send at the same time, at most; a server holds a bucket of each. "
        "More than the adapters of a server's machine send no faster. 1: rank 0 sends everything",
    )
    timeout_s: float = Field(
        300.0, gt=0, description="a server, or a trainer rank, that gets no further for so long fails the run"
    )
    checksum_every: int = Field(
        10,
        ge=0,
        description="every so many transfers, what the servers hold is compared with what was sent, by name; 0: never",
    )

    def checks(self, version: int) -> bool:
        """Whether the transfer of a version (counted from 1) is compared."""
        return self.checksum_every > 0 and (version - 1) % self.checksum_every == 0
