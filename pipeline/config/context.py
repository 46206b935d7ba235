"""How long a request may be: what a run needs, what its model reaches, what the server is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.file import ConfigError

if TYPE_CHECKING:
    from pipeline.config.tree import Config

DEFAULT_CONTEXT = 4096
_LENGTH_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")


def request_tokens(prompt: int, answer: int) -> int:
    """Tokens that SGLang (0.5.23) must have room for, in its context and in its cache, to serve a prompt and an answer
    of these lengths whole.

    It keeps two for itself and cuts the answer in silence where they are missing; and it refuses a prompt that does not
    leave seven.
    """
    return max(prompt + answer + 2, prompt + 7)


def model_context(hf: dict[str, Any]) -> int:
    """The longest context of a model, tokens, by its config.json, as SGLang derives it."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    # Of these types max_position_embeddings is the length after stretching.
    stretched = (scaling.get("rope_type") or scaling.get("type")) in ("llama3", "yarn", "longrope")
    factor = 1 if stretched or "original_max_position_embeddings" in scaling else scaling.get("factor") or 1
    positions = next((hf[key] for key in _LENGTH_KEYS if hf.get(key) is not None), 2048)
    return int(factor * positions)


def fit_context(config: Config, hf: dict[str, Any]) -> Config:
    """The configuration with server.context_length settled. hf: the model's config.json.

    Raises ConfigError where the model does not reach as far as the run, or the setting, goes.
    """
    if "max_position_embeddings" not in hf:
        raise ConfigError(
            "model.path: config.json: max_position_embeddings is missing (transformers would take its class's own "
            "number, which need not be this model's); write it"
        )
    longest, prompt, answer = model_context(hf), config.data.max_prompt_tokens, config.rollout.max_new_tokens
    needed = request_tokens(prompt, answer)
    if needed > longest:
        raise ConfigError(
            f"data.max_prompt_tokens={prompt} and rollout.max_new_tokens={answer} need a context of {needed} tokens "
            f"(SGLang's own two included), and the model's is {longest} (max_position_embeddings); lower one of the two"
        )
    context = config.server.context_length or min(max(DEFAULT_CONTEXT, needed), longest)
    if context > longest:
        raise ConfigError(
            f"server.context_length={context} is more than the model's {longest} (max_position_embeddings); set that "
            "or less, or leave it out"
        )
    server = config.server.model_copy(update={"context_length": context})
    return config.model_copy(update={"server": server})
