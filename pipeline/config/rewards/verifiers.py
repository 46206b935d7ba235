"""The kinds of verifiers, and what each is told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_ext.config import Frozen
from pipeline.text.named import is_among, names_in

_AFTER_S = 10.0
"""Seconds that the code verifier has beyond those of its programs."""


def _filled_in(value: Any) -> list[str]:
    """Of texts what their prompt has to have."""
    return [name for name in names_in(value) if name not in ("prompt", "response")]


def _first_missing(keys: Iterable[str], metadata: Mapping[str, Any]) -> str | None:
    return next((key for key in keys if metadata.get(key) is None), None)


class Reward(Frozen):
    """What every verifier has."""

    weight: float = Field(1.0, description="of its number in the reward, which is their sum")
    name: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="its metric is reward/ and this; null: its kind, or its function's name",
    )
    timeout_s: float | None = Field(None, gt=0, description="of one answer; null: grading.timeout_s")
    sources: tuple[str, ...] = Field(
        (), description="names of the sources whose prompts it grades, where a run has several; empty: of all"
    )

    def grades(self, source: str) -> bool:
        """Whether prompts of a source are its own: one that it names, or a task of one of reasoning-gym."""
        return is_among(source, self.sources)

    @property
    def metric(self) -> str:
        """The part of its metric behind the /."""
        return self.name or getattr(self, "kind")  # noqa: B009  which every kind has

    @property
    def variables(self) -> tuple[str, ...]:
        """Variables of the environment that it needs."""
        return ()

    @property
    def servers(self) -> tuple[str, ...]:
        """URLs that it asks, where no proxy stands in between."""
        return ()

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        """A key that it needs of a prompt's metadata and that is not there, or null; None: nothing that it is known to
        need is missing."""
        return None

    def limit_s(self, default: float) -> float:
        """Seconds that it may take on one answer. default: of grading.timeout_s."""
        return default if self.timeout_s is None else self.timeout_s


class Checked(Reward):
    """What a verifier has that compares with an answer."""

    answer: str = Field("answer", description="key of the prompt's metadata that holds what is right")

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return _first_missing((self.answer,), metadata)


class ExactMatchReward(Checked):
    """1 for exactly the answer, but for white space around it."""

    kind: Literal["exact_match"] = "exact_match"


class NumberReward(Checked):
    """1 where the last number of the response is the answer's."""

    kind: Literal["number"] = "number"
    after: str | None = Field(
        None, min_length=1, description="text that announces the number: the first one behind its last place counts"
    )
    tolerance: float = Field(0.0, ge=0, description="relative difference that still counts as equal")


class MultipleChoiceReward(Checked):
    """1 where the response chooses the answer's letter."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    choices: str = Field(
        "ABCD", pattern=r"^[A-Z]{2,26}$", description="the letters there are; an answer 0 is the first"
    )


class RegexReward(Checked):
    """1 where a pattern is found; where it has a group named answer, that must be the answer too."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(description="of Python's re, searched in the response; \\A and \\Z bind it to its ends")

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the pattern {self.pattern!r} is none of Python's re: {error}") from error
        return self

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return super().lacks(metadata) if "answer" in re.compile(self.pattern).groupindex else None


class MathVerifyReward(Checked):
    """1 where the response's last expression equals the answer's, by the library math-verify."""

    kind: Literal["math_verify"] = "math_verify"
    boxed: bool = Field(False, description="only what stands in \\boxed{} counts")
    digits: int = Field(6, ge=1, le=30, description="decimal places that numbers are compared to")
    timeout_s: float | None = Field(5.0, gt=0, description="of one answer; null: grading.timeout_s")


class ReasoningGymReward(Reward):
    """What the data set of reasoning-gym that made the prompt says of the response."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    tag: str | None = Field(
        "answer",
        pattern=r"^\w+$",
        description="the answer stands in the last <TAG>...</TAG> where there is one; "
        "null: all of the response is the answer",
    )

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return None if "metadata" in metadata else _first_missing(("reasoning_gym",), metadata)


class SandboxConfig(Frozen):
    """Where programs of a model run, and what one may take."""

    mode: Literal["bubblewrap", "remote", "unsafe"] = Field(
        "bubblewrap",
        description="bubblewrap: in namespaces of this machine; remote: a SandboxFusion service; unsafe: with this "
        "user's files and network",
    )
    url: str | None = Field(None, pattern=r"^https?://", description="of the service, for remote")
    python: Path | None = Field(
        None, description="interpreter of programs, which sees its own folder; null: this run's, without its packages"
    )
    cpu_s: int = Field(5, ge=1, description="processor time of one test, seconds")
    wall_s: float = Field(10.0, gt=0, description="time of one test, seconds")
    total_s: float = Field(60.0, gt=0, description="time of all tests of an answer, seconds")
    memory_mb: int = Field(512, ge=64, description="of all its processes, 1e6 bytes")
    processes: int = Field(16, ge=1, le=200, description="at a time, threads included")
    files_mb: int = Field(32, ge=1, description="of all files that it writes, 1e6 bytes; they are gone with it")
    output_kb: int = Field(1024, ge=1, description="that it prints, 1e3 bytes")

    @model_validator(mode="after")
    def _url(self) -> Self:
        if (self.mode == "remote") != (self.url is not None):
            raise ValueError("mode: remote and url go together: give both, or neither")
        return self


class CodeReward(Reward):
    """1 where the response's program passes all tests."""

    kind: Literal["code"] = "code"
    tests: str = Field("tests", description="key of the prompt's metadata that holds them")
    share: bool = Field(False, description="the share of tests that it passes, not 1 for all and 0 for less")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)  # pyright: ignore[reportArgumentType]

    @property
    def servers(self) -> tuple[str, ...]:
        return () if self.sandbox.url is None else (self.sandbox.url,)

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return _first_missing((self.tests,), metadata)

    def limit_s(self, default: float) -> float:
        """Beyond the time of its programs: one that takes too long is wrong, and no failure of the verifier."""
        return self.timeout_s or self.sandbox.total_s + self.sandbox.wall_s + _AFTER_S


class Remote(Reward):
    """What a verifier has that asks a server."""

    url: str = Field(pattern=r"^https?://", description="that is asked with POST")
    key_variable: str | None = Field(
        None, pattern=r"^\w+$", description="variable of the environment with the key that it is asked with"
    )
    proxies: bool = Field(False, description="the proxies of the environment count")

    @property
    def variables(self) -> tuple[str, ...]:
        return () if self.key_variable is None else (self.key_variable,)

    @property
    def servers(self) -> tuple[str, ...]:
        return () if self.proxies else (self.url,)


class RewardModelReward(Remote):
    """The number that a server gives."""

    kind: Literal["reward_model"] = "reward_model"
    body: dict[str, Any] = Field(
        default_factory=lambda: {"prompt": "{prompt}", "response": "{response}"},
        description="JSON that is sent; {prompt}, {response} and {KEY} of the prompt's metadata are filled in",
    )
    reward_at: str = Field(
        "reward", description="where the number stands in what comes back: keys and places with dots"
    )

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return _first_missing(_filled_in(self.body), metadata)


class JudgeReward(Remote):
    """The score that a language model gives, over an OpenAI-compatible endpoint."""

    kind: Literal["judge"] = "judge"
    model: str = Field(description="its name there")
    template: str = Field(
        description="what it is told; {prompt}, {response} and {KEY} of the prompt's metadata are filled in"
    )
    pattern: str = Field(
        r"(?i)score\W{1,4}?(-?\d+(?:\.\d+)?)", description="finds the score, its one group; the last place counts"
    )
    scale: tuple[float, float] = Field((0.0, 10.0), description="scores that are reward 0 and reward 1")
    max_tokens: int = Field(1024, ge=1, description="of what it says")
    temperature: float = Field(0.0, ge=0, description="that it samples with")

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"the pattern {self.pattern!r} is none of Python's re: {error}") from error
        if groups != 1:
            raise ValueError(f"the pattern {self.pattern!r} has {groups} groups; the score is the one that it needs")
        if self.scale[0] == self.scale[1]:
            raise ValueError("scale is two different scores: of reward 0 and of reward 1")
        if "{response}" not in self.template:
            raise ValueError("the template needs {response}, or the judge would not see the answer")
        return self

    def lacks(self, metadata: Mapping[str, Any]) -> str | None:
        return _first_missing(_filled_in(self.template), metadata)


class LengthReward(Reward):
    """From 0 for short answers down to -1 for long ones: DAPO's soft punishment of overlong answers."""

    kind: Literal["length"] = "length"
    free_tokens: int = Field(ge=0, description="sampled tokens up to which it is 0")
    full_tokens: int = Field(ge=1, description="sampled tokens from which on it is -1; in between it falls evenly")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.free_tokens >= self.full_tokens:
            raise ValueError(f"free_tokens={self.free_tokens} is not less than full_tokens={self.full_tokens}")
        return self


class FunctionReward(Reward):
    """What a Python function of your own returns."""

    kind: Literal["function"] = "function"
    function: str = Field(description="package.module:function")
    directory: Path | None = Field(
        None,
        description="folder that its module is looked for in first; null: that of the YAML file, or of its nearest "
        "base, where the module lies there",
    )

    @field_validator("function")
    @classmethod
    def _module_and_name(cls, function: str) -> str:
        module, colon, name = function.partition(":")
        if module.endswith(".py") or "/" in module:
            folder, _, file = module.rpartition("/")
            beside = f", with directory: {folder}, or the file beside the YAML file" if folder else ""
            raise ValueError(f"{function!r} names a file; write its module, {file.removesuffix('.py')}:{name}{beside}")
        if not (module and colon and name) or ":" in name:
            raise ValueError(f"a verifier of your own is package.module:function, not {function!r}")
        return function

    @property
    def metric(self) -> str:
        return self.name or self.function.rpartition(":")[2].lower()
