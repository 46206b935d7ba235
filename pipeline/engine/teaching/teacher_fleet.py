"""Servers that hold a teacher: they score what the policy sampled, and get no weights.

They are a fleet like the run's own, so one that dies is started again, with the weights that it began with, which are
the teacher's. Their version is 0 for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.engine.client import AbortedError
from pipeline.engine.fleet import Fleet
from pipeline.engine.server import ServerError
from pipeline.teaching.teacher_scores import TeacherScores


class TeacherFleet(Fleet):
    """See Fleet; nobody calls `transfer`."""

    async def teach(self, token_ids: Sequence[int] | np.ndarray, start: int, top_k: int) -> TeacherScores:
        """SGLangClient.teach of one of the servers; asked again where it is lost. Raises ServerError, which names the
        teacher where none will come back."""
        while True:
            try:
                return await self._ask(None, lambda client: client.teach(token_ids, start, top_k))
            except AbortedError:
                continue
            except ServerError as error:
                if self.members.hopeful and self.members.failure is None:
                    raise
                raise ServerError(f"the teacher: {error}{self._begin_again}") from error

    @property
    def _begin_again(self) -> str:
        if not any(server.added for server in self.servers):
            return ""
        return "; start the server of teacher.url again, and --resume goes on where there is a checkpoint"
