"""What a client may ask of /v1/chat/completions.

A field is honoured, or it may only have the value that the run has, or it is one of IGNORED, which change no answer.
Everything else is refused by name: an agent that believes it set something is worse than one that ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.engine.sampling import Sampling
from pipeline.environments.endpoint.refusals import Refusal

IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
"""Fields for a provider's books."""


class Part(BaseModel):
    """Of a request, without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Part):
    """A piece of a content."""

    type: Literal["text"]
    text: str


class CalledFunction(Part):
    """arguments: JSON."""

    name: str
    arguments: str


class ToolCall(Part):
    """index: that streams have, and some clients keep."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Part):
    """The fields that stand last are those an answer may have empty, and that clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class OfferedFunction(Part):
    """parameters: JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OfferedTool(Part):
    """A tool that the policy may call."""

    type: Literal["function"]
    function: OfferedFunction


class StreamOptions(Part):
    """include_usage: a last piece has the counts of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Part):
    """A request; `check` holds it against the run."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[OfferedTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @classmethod
    def read(cls, body: Any) -> ChatRequest:
        """Of a body that was JSON. Raises Refusal."""
        return read_body(cls, body)

    @property
    def limit(self) -> int | None:
        """Tokens of the answer; None: the client names none."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """Tools as the chat template takes them; None: the client names none."""
        if self.tools is None:
            return None
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def check(self, sampling: Sampling, model: str) -> None:
        """Raises Refusal for what the run has fixed otherwise."""
        if self.model != model:
            raise Refusal(
                404, f"there is no model {self.model!r}; this run's is {model!r}", code="model_not_found", param="model"
            )
        fixed: dict[str, tuple[Any, ...]] = {
            "temperature": (sampling.temperature,),
            "top_p": (sampling.top_p,),
            "presence_penalty": (0,),
            "frequency_penalty": (0,),
            "stop": ([],),
            "seed": (),
            "logit_bias": ({},),
            "response_format": ({"type": "text"},),
        }
        for name, allowed in fixed.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                instead = f"send {allowed[0]!r}, or leave it out" if allowed else "leave it out"
                raise Refusal(
                    400, f"{name}={value!r} is not what the run samples with; {instead}", code="unsupported_value",
                    param=name,
                )  # fmt: skip
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise Refusal(
                400, "max_tokens and max_completion_tokens differ; send one", code="invalid_value", param="max_tokens"
            )


def read_body[T: BaseModel](form: type[T], body: Any, kinds: Sequence[str] = ()) -> T:
    """A request of this form, of a body that was JSON. kinds: see _first_mistake. Raises Refusal."""
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    try:
        return form.model_validate(body)
    except ValidationError as error:
        raise _first_mistake(error, kinds) from error


def _first_mistake(error: ValidationError, kinds: Sequence[str] = ()) -> Refusal:
    """By the name of its field: the deepest, as of what may be one thing or another the others end sooner. kinds: of
    things in a list, which are no part of its name."""
    found = max(error.errors(include_url=False), key=lambda mistake: len(mistake["loc"]))
    param, in_list = "", False
    for step in found["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not (in_list and step in kinds) and not step.startswith(("str", "list[")):  # not the branch of a union
            param += f".{step}" if param else step
        in_list = isinstance(step, int)
    if found["type"] == "extra_forbidden":
        return Refusal(400, f"unknown field {param}", code="unknown_parameter", param=param)
    return Refusal(400, f"{param}: {found['msg']}", code="invalid_value", param=param)
