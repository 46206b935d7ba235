"""Verifiers by name, or by the dotted path of a user's own function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


def resolve_reward(name: str) -> RewardFunction:
    """The verifier of a registered name or of "package.module:function". Raises RewardError, saying what there is."""
    if ":" not in name:
        if name not in _REWARDS:
            raise RewardError(
                f"there is no verifier {name!r}; there are {', '.join(sorted(_REWARDS))}, "
                "or write your own as package.module:function"
            )
        return _REWARDS[name]
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RewardError(f"the verifier {name!r} cannot be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardError(f"the module {module_name} has no function {attribute!r}")
    return cast(RewardFunction, function)
