"""Verifiers by name, or by the dotted path of a user's own function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np

from pipeline.errors import SamerouteError
from pipeline.types import FinishReason, Prompt


class RewardError(SamerouteError, ValueError):
    """A verifier does not exist, raised, or returned no number."""


class RewardFunction(Protocol):
    """A verifier.

    prompt:        its metadata holds what there is to check against.
    response_text: the answer without its stop token; any other special token stands in the text.
    response_ids:  [N] int32, the stop token included.
    finish_reason: "stop", "length" or "abort".
    Returns the reward, a finite number.
    """

    def __call__(
        self, prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason
    ) -> float: ...


_REWARDS: dict[str, RewardFunction] = {}


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Add a verifier under a name. Raises RewardError for a name that is taken."""

    def add(function: RewardFunction) -> RewardFunction:
        if name in _REWARDS:
            raise RewardError(f"there is already a verifier {name!r}")
        _REWARDS[name] = function
        return function

    return add


def resolve_reward(name: str, directory: Path | None = None) -> RewardFunction:
    """The verifier of a registered name or of "package.module:function".

    directory: where the module is looked for first. Raises RewardError, saying what there is.
    """
    if ":" not in name:
        if name not in _REWARDS:
            raise RewardError(
                f"there is no verifier {name!r}; there are {', '.join(sorted(_REWARDS))}, "
                "or write your own as package.module:function"
            )
        return _REWARDS[name]
    module_name, _, attribute = name.partition(":")
    try:
        module = _import(module_name, directory)
    except ImportError as error:
        raise RewardError(f"the verifier {name!r} cannot be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardError(f"the module {module_name} has no function {attribute!r}")
    return cast(RewardFunction, function)


def _import(name: str, directory: Path | None) -> ModuleType:
    if directory is None:
        return importlib.import_module(name)
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module = importlib.import_module(name)
    place = getattr(module, "__file__", None)
    if place is None or not Path(place).resolve().is_relative_to(directory.resolve()):
        raise RewardError(f"the module {name} of {directory} is hidden by {place or 'one of Python'}; rename the file")
    return module
