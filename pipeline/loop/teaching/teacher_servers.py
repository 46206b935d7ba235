"""The teacher's servers: made like the run's own, for another model, and never sent weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.config.precision import TEMPERATURE_VARIABLE
from pipeline.engine.client import SGLangClient
from pipeline.engine.fleet import FleetServer, ServerProcess
from pipeline.engine.joining.added_server import AddedServer
from pipeline.engine.server import SGLangServer
from pipeline.engine.teaching.teacher_fleet import TeacherFleet
from pipeline.loop.teaching.teacher_model import keys_of, score_tokens


def teacher_processes(
    config: Config, directory: Path, logs: Path, *, device: str, environment: dict[str, str], base_gpu: int
) -> list[SGLangServer]:
    """Not started; none where one runs already. base_gpu: of the first."""
    teacher = config.teacher
    if teacher is None or teacher.engine != "server" or teacher.url is not None:
        return []
    own = teacher.server.model_copy(update={"context_length": teacher.server.context_length or score_tokens(config)})
    temperature = config.precision.temperature
    scaled = {} if temperature == 1 else {TEMPERATURE_VARIABLE: repr(temperature)}
    count = own.replicas or 1
    return [
        SGLangServer(
            own,
            directory,
            logs / ("teacher.log" if count == 1 else f"teacher_{number}.log"),
            device="cpu" if device == "cpu" else "cuda",
            seed=config.run.seed,
            return_routed_experts=False,
            precision=config.precision,
            trust_remote_code=config.model.trust_remote_code,
            base_gpu=base_gpu + number * own.tensor_parallel,
            environment=environment | scaled,
        )
        for number in range(count)
    ]


def teacher_fleet(
    config: Config, processes: Sequence[ServerProcess], client: Callable[[ServerProcess], SGLangClient]
) -> TeacherFleet | None:
    """Of started processes, or of the server that runs already. client: of one of them. None: no server teaches."""
    teacher = config.teacher
    if teacher is None or teacher.engine != "server":
        return None
    every = processes if teacher.url is None else [AddedServer(teacher.url, keys_of(teacher))]
    members = [FleetServer(process, client(process), added=teacher.url is not None) for process in every]
    return TeacherFleet(members, teacher.server)
