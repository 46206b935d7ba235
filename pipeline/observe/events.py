"""TensorBoard events by tensorboard's own format: torch's wrapper takes 5 s to import, this 1 s.

Written by the caller, not by tensorboard's thread: that dies of a full disk with a traceback of its own.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.disk.disk_errors import writing
from pipeline.disk.rows import append_whole


class EventWriter:
    """A sink: scalars of one run."""

    def __init__(self, directory: Path, *, resume_after: int | None = None):
        """Makes an event file in the directory.

        resume_after: TensorBoard forgets what other files there say of later steps.
        Raises DiskError, as `record` does.
        """
        # protobuf makes these classes at import time, where a type checker does not see them.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self.file = directory / name
        with writing(self.file):
            self._stream = self.file.open("xb", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_after is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=resume_after + 1, session_log=start))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write every value under its own tag."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        with writing(self.file):
            append_whole(self._stream.fileno(), buffer.getvalue())

    def close(self, finished: bool = True) -> None:
        """A second call does nothing."""
        self._stream.close()
