"""Verifiers by name, or by the dotted path of a user's own function."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.types import FinishReason, Prompt


class RewardError(SamerouteError, ValueError):
    """Answers cannot be graded, and the run ends."""


class VerifierError(RewardError):
    """There is no such verifier, or it cannot be loaded: known before anything starts."""

    exit_code = NOT_STARTED


class RewardFunction(Protocol):
    """A verifier, a plain function or an `async def`; docs/verifiers.md has the whole contract.

    prompt:        its metadata holds what there is to check against.
    response_text: the answer without its stop token; any other special token stands in the text.
    response_ids:  [N] int32, the stop token included.
    finish_reason: "stop", "length" or "abort".
    Returns the reward, a finite number of float32.
    """

    def __call__(
        self, prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason
    ) -> float | Awaitable[float]: ...


_REWARDS: dict[str, RewardFunction] = {}
_QUICK: set[str] = set()


def register_reward(name: str, *, quick: bool = False) -> Callable[[RewardFunction], RewardFunction]:
    """Add a verifier under a name. Raises RewardError for a name that is taken.

    quick: it takes microseconds, starts nothing and cannot hang or crash, so that one worker is enough, and verdicts on
    many answers travel together.
    """

    def add(function: RewardFunction) -> RewardFunction:
        if name in _REWARDS:
            raise RewardError(f"there is already a verifier {name!r}")
        _REWARDS[name] = function
        if quick:
            _QUICK.add(name)
        return function

    return add


def is_quick(name: str) -> bool:
    """Whether a verifier was registered as quick."""
    return name in _QUICK


def is_users_own(name: str) -> bool:
    """Whether a name is a dotted path. Raises VerifierError for one that is neither that nor registered."""
    if ":" in name:
        return True
    if name not in _REWARDS:
        raise VerifierError(
            f"there is no verifier {name!r}; there are {', '.join(sorted(_REWARDS))}, "
            "or write your own as package.module:function"
        )
    return False


def resolve_reward(name: str, directory: Path | None = None) -> RewardFunction:
    """The verifier of a registered name or of "package.module:function".

    directory: where the module is looked for first. A user's own module is imported here, and may do anything: only a
    grader's worker calls this for one. Raises VerifierError, saying what there is, or what is wrong with the module.
    """
    if not is_users_own(name):
        return _REWARDS[name]
    module_name, _, attribute = name.partition(":")
    try:
        module = _import(module_name, directory)
    except SystemExit as error:
        raise VerifierError(
            f"the verifier {name!r} cannot be imported: its module calls sys.exit({error.code!r}) when it is imported"
        ) from error
    except VerifierError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise VerifierError(f"the verifier {name!r} cannot be imported: {describe(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or module_name
        raise VerifierError(f"the verifier {name!r} cannot be imported: {where} has no function {attribute!r}")
    return cast(RewardFunction, function)


def _import(name: str, directory: Path | None) -> ModuleType:
    if directory is None:
        return importlib.import_module(name)
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module = importlib.import_module(name)
    place = getattr(module, "__file__", None)
    if place is None or not Path(place).resolve().is_relative_to(directory.resolve()):
        hidden = f"the module {name} of {directory} is hidden by {place or 'one of Python'}; rename the file"
        raise VerifierError(hidden)
    return module


def describe(error: BaseException, limit: int = 500) -> str:
    """An exception in one line: its type, at most `limit` characters of its message, and where it was raised."""
    text = " ".join(str(error).split())
    if len(text) > limit:
        text = f"{text[:limit]}..."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    if isinstance(error, SyntaxError):  # its text names the file's name and line
        where = f" in {error.filename}" if error.filename else ""
    elif isinstance(error, ModuleNotFoundError) or not frames:
        where = ""
    else:
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
