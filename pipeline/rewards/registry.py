"""Which kinds of verifiers there are, and how one is loaded.

A kind is a file of `kinds/` with a function `load(settings) -> Verifier`; its settings are the class of that kind in
`pipeline.config.rewards`, as plain values. Only a grader's worker loads one: a user's own module may do anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import traceback
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import NOT_STARTED, SamerouteError
from pipeline.rewards.protocol import Question
from pipeline.text.named import is_among

Verifier = Callable[[Question], float | Awaitable[float]]
"""From an answer to its reward, a finite number of float32; it may be an `async def`."""


class RewardError(SamerouteError, ValueError):
    """Answers cannot be graded, and the run ends."""


class VerifierError(RewardError):
    """There is no such verifier, or it cannot be loaded: known before anything starts."""

    exit_code = NOT_STARTED


@dataclass(frozen=True)
class Kind:
    """A kind of verifier.

    quick:   it takes microseconds, starts nothing and cannot hang or crash, so that one worker is enough, and verdicts
             on many answers travel together.
    imports: libraries that workers share, because their supervisor imports them before it forks.
    """

    quick: bool = False
    imports: tuple[str, ...] = ()


KINDS = {
    "exact_match": Kind(quick=True),
    "number": Kind(quick=True),
    "multiple_choice": Kind(quick=True),
    "length": Kind(quick=True),
    "regex": Kind(),
    "math_verify": Kind(imports=("math_verify",)),
    "reasoning_gym": Kind(imports=("reasoning_gym",)),
    "code": Kind(),
    "reward_model": Kind(imports=("aiohttp",)),
    "judge": Kind(imports=("aiohttp",)),
    "function": Kind(),
}


@dataclass(frozen=True)
class Component:
    """One verifier of a run, a part of the reward.

    name: of its metric. settings: its kind and what that needs, plain values. weight: in the reward. timeout_s: of one
    answer; None: the grader's. sources: whose prompts it grades; empty: all.
    """

    name: str
    settings: Mapping[str, Any]
    weight: float = 1.0
    timeout_s: float | None = None
    sources: Sequence[str] = ()

    @classmethod
    def named(cls, text: str) -> Component:
        """Of the short form: the name of a kind that needs no settings, or package.module:function.

        Raises VerifierError for a text that is neither.
        """
        if ":" in text:
            return cls(text.rpartition(":")[2], {"kind": "function", "function": text})
        if text not in KINDS:
            raise VerifierError(unknown(text))
        return cls(text, {"kind": text})

    def grades(self, source: str) -> bool:
        """Whether prompts of a source are its own."""
        return is_among(source, self.sources)

    @property
    def title(self) -> str:
        """What messages call it: its function, or its name."""
        return str(self.settings.get("function", self.name))

    @property
    def kind(self) -> Kind:
        return KINDS[self.settings["kind"]]


def unknown(kind: str) -> str:
    """What to say where there is no such kind."""
    return (
        f"there is no verifier {kind!r}; there are {', '.join(sorted(KINDS))}, "
        "or write your own as package.module:function"
    )


def is_quick(component: Component) -> bool:
    """Whether its kind is."""
    return component.kind.quick


def title(components: Sequence[Component]) -> str:
    """How a message calls them, where it cannot say which it was."""
    names = ", ".join(repr(component.title) for component in components)
    return f"the verifier {names}" if len(components) == 1 else f"one of the verifiers {names}"


def preload(components: Sequence[Component]) -> None:
    """Import what workers are to share. A library that is not there is no error here: `load` says which it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib 2.4.0, which reasoning_gym imports
        for component in components:
            for library in component.kind.imports:
                if importlib.util.find_spec(library) is not None:
                    importlib.import_module(library)


def load(component: Component) -> Verifier:
    """The verifier of a component. Raises VerifierError, saying what there is, or what is wrong with it."""
    module = importlib.import_module(f"pipeline.rewards.kinds.{component.settings['kind']}")
    try:
        return module.load(component.settings)
    except SystemExit as error:
        raise VerifierError(
            f"the verifier {component.title!r} cannot be imported: its module calls sys.exit({error.code!r}) when it "
            "is imported"
        ) from error
    except VerifierError:
        raise
    except BaseException as error:  # a user's module may raise anything, KeyboardInterrupt too
        raise VerifierError(f"the verifier {component.title!r} cannot be imported: {describe(error)}") from error


def describe(error: BaseException, limit: int = 500) -> str:
    """An exception in one line: its type, at most `limit` characters of its message, and where it was raised."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a class of the user's
        text = "it cannot be printed"
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
