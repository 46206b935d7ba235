"""Traces of chosen steps: of trainer ranks by torch's profiler, of servers by SGLang's own.

profiles/step_000012/trainer_rank0.json.gz      for Perfetto (ui.perfetto.dev) or chrome://tracing
profiles/step_000012/server_0/*.trace.json.gz   a file a scheduler of the server
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.run import ProfileConfig
from pipeline.engine.control import SGLangControl
from pipeline.engine.fleet import Fleet
from pipeline.engine.server import ServerError
from pipeline.trainer.group import TrainerGroup

FOLDER = "profiles"


class Profiles:
    """Those of a run. say: hears where they are, and of a server that makes none."""

    def __init__(
        self, config: ProfileConfig, directory: Path, trainers: TrainerGroup, fleet: Fleet, say: Callable[[str], None]
    ):
        self.config, self.folder, self.trainers, self.fleet, self.say = config, directory / FOLDER, trainers, fleet, say

    @contextlib.contextmanager
    def of_step(self, number: int) -> Iterator[None]:
        """Around a step: trace it where it is one of the chosen."""
        if number not in self.config.steps:
            yield
            return
        folder = (self.folder / f"step_{number:06d}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        begun = [server for server in self.config.servers if self._ask(server, "/start_profile", folder)]
        self.trainers.begin_profile(self.config.ranks)
        try:
            yield
        finally:
            for server in begun:
                self._ask(server, "/stop_profile", folder)
        self.trainers.end_profile(self.config.ranks, folder)
        self.say(f"step {number}: its traces are in {folder}")

    def _ask(self, number: int, path: str, folder: Path) -> bool:
        """Whether a server did it. A trace is worth no run: what a server refuses is said."""
        if number >= len(self.fleet.servers):
            self.say(f"debug.profile.servers: there is no server {number}; there are {len(self.fleet.servers)}")
            return False
        address = self.fleet.servers[number].address
        own = folder / f"server_{number}"
        own.mkdir(exist_ok=True)
        body = {"output_dir": str(own), "activities": ["CPU", "GPU"]} if path == "/start_profile" else None
        try:
            SGLangControl(address.url, keys=address.keys, log_path=address.log_path).post(path, body)
        except ServerError as error:
            self.say(f"server {number} makes no trace: {error}")
            return False
        return True
