"""The environment that a configuration names: found, tried with its chat template, and opened in its threads."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.rewards.conversations import EnvironmentConfig
from pipeline.environments.endpoint.subprogram import Program, which
from pipeline.environments.reward import Environment
from pipeline.environments.running import Environments, turn_parser
from pipeline.environments.templates import TemplateWriter, check_growth
from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.rewards.kinds.function import import_from
from pipeline.rewards.registry import describe
from pipeline.types import Prompt
from pipeline.waiting import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LoadingError(SamerouteError):
    """An environment cannot be used; the message says what to change."""

    exit_code = NOT_STARTED


class _Function:
    """A plain function as an environment."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        self.run = functools.partial(function, **options)


def environment_of(config: EnvironmentConfig) -> Callable[[], Environment]:
    """What makes the environment, once for each thread. It is made here once, so that what is wrong is known before
    anything starts. Raises LoadingError."""
    if config.command is not None:
        return functools.partial(Program, _found(config.command, config.directory), config.directory, config.variables)
    name = config.function
    assert name is not None
    module_name, _, attribute = name.partition(":")
    try:
        # It may wait for a network or a lock, and for ever.
        with Waiting().during("its import", lambda: f"the environment {name}"):
            make, environment = _made(module_name, attribute, config)
    except SamerouteError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or error.name not in (module_name, module_name.partition(".")[0]):
            raise LoadingError(f"environment: {name} cannot be used: {describe(error)}") from error
        raise LoadingError(
            f"environment: there is no module {error.name}; write it beside the YAML file or into a folder of "
            f"PYTHONPATH, or correct environment.function={name}"
        ) from error
    except BaseException as error:  # a user's module may raise anything
        raise LoadingError(f"environment: {name} cannot be used: {describe(error)}") from error
    _check(name, environment)
    return cast(Callable[[], Environment], make)


def _made(module: str, attribute: str, config: EnvironmentConfig) -> tuple[Callable[..., Any], Any]:
    """What makes the environment, and one. Raises LoadingError, and whatever the module raises."""
    found = getattr(import_from(module, config.directory), attribute, None)
    if found is None:
        wrong = f"environment: {module} has no {attribute!r}; correct environment.function={config.function}"
        raise LoadingError(wrong)
    make: Callable[..., Any] = functools.partial(_Function, found, config.options)
    if inspect.isclass(found):
        make = functools.partial(found, **config.options)
    return make, make()


def _found(command: Sequence[str], directory: Path | None) -> tuple[str, ...]:
    """The command, its program by its path. Raises LoadingError."""
    if directory is not None and not directory.is_dir():
        raise LoadingError(f"environment: there is no folder {directory}; correct environment.directory")
    program = which(command[0], directory)
    if program is None:
        raise LoadingError(f"environment: there is no program {command[0]}; correct environment.command")
    return (program, *command[1:])


def _check(name: str, environment: Any) -> None:
    """Raise LoadingError for what cannot be called as environments are."""
    run = getattr(environment, "run", None)
    called, options = (run.func, run.keywords) if isinstance(run, functools.partial) else (run, {})
    if not inspect.iscoroutinefunction(called):
        raise LoadingError(f"environment: {name} has no `async def run(conversation, prompt)`")
    assert run is not None
    try:
        inspect.signature(called).bind("conversation", "prompt", **options)
    except TypeError as error:
        raise LoadingError(
            f"environment: {name} is called with (conversation, prompt) and environment.options, and it takes "
            f"{inspect.signature(called)}: {error}"
        ) from error


def check_conversation(
    config: EnvironmentConfig | None, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], prompt: Prompt
) -> None:
    """Raise HistoryError where a conversation that begins with this prompt could not grow as the configuration says:
    the chat template changes what stands there, or has no such role."""
    if config is not None and config.history == "refuse":
        assert prompt.opening is not None
        check_growth(TemplateWriter(tokenizer, prompt.opening, stop_token_ids), config.replies)


@contextlib.contextmanager
def open_environments(
    config: EnvironmentConfig | None, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> Iterator[Environments | None]:
    """Those of a run, in their threads; None where it has none. stop_token_ids: that end an answer. Raises
    LoadingError."""
    if config is None:
        yield None
        return
    turn_parser(config).load()
    with Environments(config, environment_of(config), tokenizer, stop_token_ids) as opened:
        yield opened
