"""What opens a run's servers: whoever cannot read this process's memory can neither sample from them nor steer them.

SGLang (0.5.23) knows two keys and lets each open only its own: the API key what samples and tells, the admin key what
changes the server. /ready, /health and /metrics are open. A key is sent as `Authorization: Bearer KEY`.

Keys travel in memory, by a pipe to the server's process and by Ray to another node: never on a command line, in an
environment, in a file. But those of a server that a person starts for a run (`sameroute servers RUN --start`) lie in
a file of the run's directory, as long as it runs, that its owner alone can read.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Self

_API_PATHS = frozenset({"/generate", "/model_info", "/server_info", "/v1/loads"})


@dataclass(frozen=True)
class ServerKeys:
    """The pair of a run's servers. Its repr shows neither."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    @classmethod
    def random(cls) -> Self:
        """A new pair, 256 bits each."""
        return cls(secrets.token_urlsafe(32), secrets.token_urlsafe(32))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` made. Raises ValueError for anything else."""
        api, admin = json.loads(data)
        return cls(api, admin)

    def to_bytes(self) -> bytes:
        """Less than a pipe holds, so that writing it waits for nobody."""
        return json.dumps([self.api, self.admin]).encode()

    def of_path(self, path: str) -> str:
        """The key that opens this endpoint."""
        return self.api if path in _API_PATHS else self.admin
