"""TensorBoard events by tensorboard's own writer: torch's wrapper takes 5 s to import, this 1 s."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path


class EventWriter:
    """A sink: scalars of one run."""

    def __init__(self, directory: Path):
        """Makes an event file in the directory."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))

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
