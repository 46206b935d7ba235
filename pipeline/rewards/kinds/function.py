"""A plain Python function of the user's own, as package.module:function; docs/rewards.md has its contract."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from pipeline.rewards.protocol import Question
from pipeline.rewards.registry import Verifier, VerifierError
from pipeline.types import FinishReason, Prompt

_PARAMETERS = ("prompt", "response_text", "response_ids", "finish_reason")


class RewardFunction(Protocol):
    """A plain function or an `async def`.

    prompt:        its metadata holds what there is to check against.
    response_text: the answer without its stop token; any other special token stands in the text.
    response_ids:  [N] int32, the stop token included.
    finish_reason: "stop", "length" or "abort".
    Returns the reward, a finite number of float32.
    """

    def __call__(
        self, prompt: Prompt, response_text: str, response_ids: np.ndarray, finish_reason: FinishReason
    ) -> float | Awaitable[float]: ...


def load(settings: Mapping[str, Any]) -> Verifier:
    """The function, called with the parts of a question. Raises VerifierError, and whatever its module does."""
    directory = settings.get("directory")
    function = find(settings["function"], None if directory is None else Path(directory))

    def ask(question: Question) -> float | Awaitable[float]:
        return function(question.prompt, question.response_text, question.response_ids, question.finish_reason)

    return ask


def find(name: str, directory: Path | None = None) -> RewardFunction:
    """The function of "package.module:function". directory: where its module is looked for first.

    Raises VerifierError where the module has no such function or another one hides it, and whatever the module raises
    when it is imported.
    """
    module_name, _, attribute = name.partition(":")
    module = import_from(module_name, directory)
    function = getattr(module, attribute, None)
    if not callable(function):
        where = getattr(module, "__file__", None) or module_name
        raise VerifierError(f"the verifier {name!r} cannot be imported: {where} has no function {attribute!r}")
    _check_signature(name, function)
    return cast(RewardFunction, function)


def _check_signature(name: str, function: Callable[..., object]) -> None:
    """Raise VerifierError for a function that cannot be called as verifiers are."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin, which does not tell
        return
    try:
        signature.bind(*_PARAMETERS)
    except TypeError as error:
        raise VerifierError(
            f"the verifier {name!r} is called with ({', '.join(_PARAMETERS)}), and it takes {signature}: {error}"
        ) from error


def import_from(name: str, directory: Path | None) -> ModuleType:
    """The module of a name. directory: where it is looked for first. Raises VerifierError where another one hides it,
    and whatever it raises."""
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
