"""What a run starts from, checked before an earlier run is written over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pipeline.checkpoints.best_model import check_export
from pipeline.cluster.address import check_address
from pipeline.cluster.one_machine import check_gpus
from pipeline.config import Config
from pipeline.config.data import not_read
from pipeline.config.load_config import check_precision, check_served
from pipeline.config.rewards import Rewards, what_lacks
from pipeline.data.chat import DataError
from pipeline.data.prompts import PromptSource
from pipeline.data.tables.row_reader import Lacks, nothing
from pipeline.data.tiny_model import make_tiny_model
from pipeline.dumps.groups import DumpError
from pipeline.dumps.steps import DumpedSteps
from pipeline.engine.server import PortError, ServerError, reserve_port
from pipeline.environments.loading import check_conversation, environment_of
from pipeline.evaluation.opened_set import OpenedSet, open_sets
from pipeline.loop.teaching.teacher_model import check_teacher
from pipeline.observe.sinks.sinks import check_sinks
from pipeline.rewards import check_rewards
from pipeline.say import to_stderr


def config_device(config: Config) -> Literal["cpu", "cuda"]:
    """Of both engines."""
    return config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def check_inputs(config: Config, *, served: bool = True) -> None:
    """What can be known to be wrong before anything starts: sinks, a precision that this device does not have, GPUs
    that this machine does not have, the verifier, the environment, the data file, the port. served: servers are
    started, and then a model that they do not serve on this device.

    Raises ObserveError, ConfigError, LoadingError, PlacementError, RewardError, DataError and PortError.
    """
    check_sinks(config)
    check_precision(config, config_device(config))
    if served:
        check_served(config, config_device(config))
    if config_device(config) == "cuda":
        check_gpus(config, torch.cuda.device_count())
    if config.checkpoint.best is not None and config.checkpoint.best.export is not None:
        check_export(config.checkpoint.best.export, config.model.path, config.run.directory)
    check_address(config.cluster.address)
    if config.environment is not None:
        environment_of(config.environment)
    check_evaluation(config, [config.rewards])


def _check_ports(config: Config) -> None:
    """Raise PortError where the servers' port is not free, or is not theirs alone."""
    port, replicas = config.server.port, config.server.replicas or 1
    if port is None:
        return
    if port == config.observe.prometheus_port:
        raise PortError(
            f"server.port and observe.prometheus_port are both {port}; give one another, or leave server.port out"
        )
    if replicas > 1 and config.cluster.address is None:
        raise PortError(
            f"{replicas} servers on one machine cannot all listen on port {port}; set server.port=null, which gives "
            "each a free one, or server.replicas=1"
        )
    try:
        reserve_port(config.server.host, port)
    except ServerError as error:
        raise PortError(f"server.port: {error}; take another, or null for a free one") from error


def check_evaluation(config: Config, others: Sequence[Rewards] = ()) -> None:
    """The same of what servers and evaluations need. others: verifiers beside theirs.

    Raises RewardError, DataError and PortError.
    """
    wanted = list(others)
    for one in config.evaluate:
        wanted += [] if (rewards := one.rewards or config.rewards) in wanted else [rewards]
    for rewards in wanted:
        check_rewards(rewards, config.grading)
    if (missing := config.missing_file) is not None:
        raise DataError(not_read(missing))
    _check_ports(config)


def check_not_replaced(config: Config) -> None:
    """Raise DataError where a new run would begin with something that lies in its own directory: what is there is moved
    aside, and removed with the first step."""
    run = config.run.directory.resolve()
    origins = [*config.data.origins, *(source for one in config.evaluate for source in one.sources)]
    teacher = None if config.teacher is None else config.teacher.path
    for path in (config.model.path, teacher, *(getattr(source, "path", None) for source in origins)):
        if path is not None and Path(path).resolve().is_relative_to(run):
            raise DataError(
                f"{path} lies in run.directory={config.run.directory}, where a new run replaces all that is there; set "
                "run.directory to another path"
            )


def check_prompts(config: Config, scratch: Path) -> tuple[PromptSource, list[OpenedSet]]:
    """The prompts of the run and of its evaluations: tokenizer, chat template, end-of-sequence token and every line of
    a data file are read, and the first prompts looked at, before a run directory is touched.

    scratch: for a tiny model's tokenizer.

    Raises DataError, and TeacherError for a teacher that cannot be.
    """
    model_path = prepare_model(config, scratch / "model")
    check_teacher(config, model_path, config_device(config))
    source = prompt_source(config, model_path)
    beginning = source.state()
    for prompt in source.take(config.rollout.prompts_per_step):  # of a generator; rows were all looked at
        if (why := lacking(config)(prompt.source, prompt.metadata)) is not None:
            raise DataError(f"{prompt.origin}: the prompt {why}")
        check_conversation(config.environment, source.tokenizer, source.stop_token_ids, prompt)
    if config.supervised.steps:
        source.take_supervised(config.supervised.batch_size)
    source.restore(beginning)
    return source, open_sets(config, model_path, to_stderr)


def prompt_source(config: Config, model_path: Path) -> PromptSource:
    """The prompts of a run with this model. Raises DataError."""
    return PromptSource(
        config.data,
        model_path,
        seed=config.run.seed,
        supervised=config.supervised.steps > 0,
        trust_remote_code=config.model.trust_remote_code,
        lacks=lacking(config),
    )


def lacking(config: Config) -> Lacks:
    """What verifiers would miss of a prompt; an environment says itself what it misses."""
    return nothing if config.environment is not None else functools.partial(what_lacks, config.rewards)


def dumped_steps(path: Path, config: Config) -> DumpedSteps:
    """A dump, or a directory of them. Raises DumpError, also where the run would delete it."""
    run = config.run.directory.resolve()
    if path.resolve().is_relative_to(run):
        raise DumpError(f"{path} lies in run.directory={config.run.directory}; set run.directory to another path")
    return DumpedSteps(path)


def prepare_model(config: Config, directory: Path) -> Path:
    """The Hugging Face directory to start from: the configured one, or a tiny one made at `directory`."""
    if config.model.path is not None:
        return config.model.path
    assert config.model.tiny is not None
    return make_tiny_model(directory, config.model.tiny, config.run.seed)
