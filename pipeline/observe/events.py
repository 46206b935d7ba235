"""TensorBoard events by tensorboard's own writer: torch's wrapper takes 5 s to import, this 1 s."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path


class EventWriter:
    """A sink: scalars of one run."""

    def __init__(self, directory: Path, *, resume_after: int | None = None):
        """Makes an event file in the directory.

        resume_after: TensorBoard forgets what other files there say of later steps.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))
        if resume_after is not None:
            from tensorboard.compat.proto import event_pb2  # see below

            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore[reportAttributeAccessIssue]
            event = event_pb2.Event(wall_time=time.time(), step=resume_after + 1, session_log=start)  # pyright: ignore[reportAttributeAccessIssue]
            self._writer.add_event(event)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write every value under its own tag."""
        # protobuf makes these classes at import time, where a type checker does not see them.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self, finished: bool = True) -> None:
        """Write out what is left."""
        self._writer.close()
