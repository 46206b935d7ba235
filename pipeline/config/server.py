"""How SGLang is run, and how long a request may be: what a run needs, what a model reaches, what the server is told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from megatron_ext.config import Frozen
from pipeline.config.file import ConfigError

if TYPE_CHECKING:
    from megatron_ext.hf.description import ModelDescription
    from pipeline.config.tree import Config

DEFAULT_CONTEXT = 4096
_KEYS = "a run makes keys of its own for its servers, which no list of processes shows"
_UNGUARDED = "SGLang answers there without asking for a key"
_BESIDE = "it has a field of its own"
_SPANS = "a server with more GPUs than a node (server.tensor_parallel) is started on several"
_REFUSED = {
    "--moe-runner-backend": f"{_BESIDE}, server.moe_runner",
    "--attention-backend": f"{_BESIDE}, server.attention_backend",
    "--prefill-attention-backend": "prompts and answers are computed by one, server.attention_backend",
    "--decode-attention-backend": "prompts and answers are computed by one, server.attention_backend",
    "--api-key": _KEYS,
    "--admin-api-key": _KEYS,
    "--grpc-port": _UNGUARDED,
    "--tokenizer-worker-num": _UNGUARDED,
    "--nnodes": _SPANS,
    "--node-rank": _SPANS,
    "--dist-init-addr": _SPANS,
}
_LENGTH_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")


CAPTURING = ("triton", "flashinfer_cutlass", "flashinfer_trtllm_routed")
"""SGLang's (0.5.23) kernels for bfloat16 experts that are handed the experts of each token, `select_experts` having
captured them (`TopK.bind_runner_backend`, layers/moe/topk.py:769). Others choose them inside: triton_kernel, which it
takes for gpt-oss by itself, and flashinfer_trtllm, for most on B200."""


class ServerConfig(Frozen):
    """How SGLang is run. Model, device, precision and seed come from the run's own settings."""

    host: str = Field("127.0.0.1", description="address that the server listens on")
    port: int | None = Field(None, ge=1, le=65535, description="TCP port; null takes a free one")
    replicas: int | None = Field(
        None,
        ge=1,
        description="servers; null: as many as the GPUs beside the trainer hold, at least one",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="GPUs (or processes, on the CPU) that hold one copy of the model; more than a machine has: the "
        "server spans machines, with as many GPUs on each",
    )
    max_running_requests: int = Field(256, ge=1, description="requests decoded together; more wait in a queue")
    max_total_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in the KV cache; null: SGLang's own sizing on GPUs; on the CPU 65,536, or "
        "context_length where that is more",
    )
    context_length: int | None = Field(
        None,
        ge=2,
        description="tokens of a prompt and its answer together and SGLang's own two, at most; null: 4096, or what the "
        "run needs where that is more, or the model's max_position_embeddings where that is less",
    )
    mem_fraction_static: float | None = Field(
        None, gt=0, lt=1, description="share of GPU memory for weights and KV cache; null: SGLang's own choice"
    )
    attention_backend: str | None = Field(
        None,
        description="SGLang's attention backend; null: SGLang's default on GPUs; on the CPU "
        "the batched one for float32, else torch_native",
    )
    moe_runner: str | None = Field(
        None,
        description="SGLang's kernels for experts on GPUs; null: triton, which tells the routes on every GPU, where "
        "its own choice may not",
    )
    prefix_cache: bool | None = Field(
        None,
        description="keep keys and values of prompts, which the answers to one prompt then read once; null: on GPUs "
        "only, since on a CPU it costs a small model more than it saves",
    )
    cpu_threads: int | None = Field(
        None,
        ge=1,
        description="torch threads a server, on the CPU; null: one for a small model (width below 256), whose matrices "
        "lose by more, else the machine's cores divided by the servers on it",
    )
    deterministic: bool = Field(
        False,
        description="batch-invariant kernels, and samples that depend on run.seed and the prompt only: the same run "
        "again, or resumed, gives the same numbers",
    )
    startup_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds until the server must answer; null: 600, and 3 more for each GB of the model's weights",
    )
    overlap_schedule: bool | None = Field(
        None, description="prepare a batch while the last one is computed; null: on GPUs only, where that costs nothing"
    )
    probe_timeout_s: float = Field(
        30.0, gt=0, description="a server whose scheduler does not answer for twice as long is killed and started again"
    )
    memory_timeout_s: float = Field(
        120.0,
        gt=0,
        description="a server that does not give its memory back, or take it, in so long is killed and started again, "
        "with cluster.colocated",
    )
    max_restarts: int = Field(
        3, ge=0, description="servers started again within restart_window_s; one more ends the run. 0: the first does"
    )
    restart_window_s: float = Field(3600.0, gt=0, description="seconds in which restarts are counted together")
    extra_args: list[str] = Field(default=[], description="further arguments of SGLang's command line, last")

    @field_validator("extra_args")
    @classmethod
    def _keys_stay(cls, arguments: list[str]) -> list[str]:
        for argument in arguments:
            name = argument.partition("=")[0]
            if name in _REFUSED:
                raise ValueError(f"{name} cannot be given: {_REFUSED[name]}; leave it out")
        return arguments


def nodes_of_server(size: int, slots: int) -> int:
    """The fewest machines that hold a server of so many GPUs (or processes). slots: of a machine.

    Raises ValueError where it has not the same number on each.
    """
    nodes = math.ceil(size / max(1, slots)) or 1
    if size % nodes:
        lower = slots * (nodes - 1)
        raise ValueError(
            f"server.tensor_parallel={size} does not divide among the {nodes} machines of {slots} that it takes; set "
            f"{lower} or {slots * nodes}"
        )
    return nodes


def servers_beside(left: int, size: int, slots: int) -> int:
    """Servers for which there is room. left: GPUs that no other engine takes. size: a server's. slots: a machine's."""
    return left // size if size <= slots else left // slots // nodes_of_server(size, slots)


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


def longest_context(model: ModelDescription) -> tuple[int, str]:
    """Tokens of the longest sequence that both engines compute alike, and the field of config.json that says so."""
    longest, indexer = model_context(model.hf), model.family.indexer
    if model.longest is None or indexer is None or longest <= model.longest:
        return longest, "max_position_embeddings"
    return model.longest, f"{indexer.chosen}, behind which its attention is sparse, which the trainer does not compute"


def fit_context(config: Config, model: ModelDescription) -> Config:
    """The configuration with server.context_length settled.

    Raises ConfigError where the model does not reach as far as the run, or the setting, goes.
    """
    if "max_position_embeddings" not in model.hf:
        raise ConfigError(
            "model.path: config.json: max_position_embeddings is missing (transformers would take its class's own "
            "number, which need not be this model's); write it"
        )
    (longest, field), prompt, answer = longest_context(model), config.data.max_prompt_tokens, config.longest_answer
    needed = request_tokens(prompt, answer)
    if needed > longest:
        raise ConfigError(
            f"data.max_prompt_tokens={prompt} and {config.longest_from}={answer} need a context of {needed} tokens "
            f"(SGLang's own two included), and the model's is {longest} ({field}); lower one of the two"
        )
    context = config.server.context_length or min(max(DEFAULT_CONTEXT, needed), longest)
    if context > longest:
        raise ConfigError(
            f"server.context_length={context} is more than the model's {longest} ({field}); set that "
            "or less, or leave it out"
        )
    server = config.server.model_copy(update={"context_length": context})
    return config.model_copy(update={"server": server})
