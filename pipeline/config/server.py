"""How SGLang is run."""

from __future__ import annotations

from pydantic import Field

from megatron_ext.config import Frozen


class ServerConfig(Frozen):
    """How SGLang is run. Model, device, precision and seed come from the run's own settings."""

    host: str = Field("127.0.0.1", description="address that the server listens on")
    port: int | None = Field(None, ge=1, le=65535, description="TCP port; null takes a free one")
    replicas: int | None = Field(
        None,
        ge=1,
        description="servers; null: as many as the GPUs beside the trainer hold, at least one",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs (or processes, on the CPU) that hold one copy of the model")
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
    prefix_cache: bool | None = Field(
        None, description="keep the KV cache of finished prompts; null: on GPUs only, where prefill costs more than it"
    )
    deterministic: bool = Field(
        False,
        description="batch-invariant kernels, and samples that depend on run.seed and the prompt only: the same run "
        "again, or resumed, gives the same numbers",
    )
    startup_timeout_s: float = Field(600.0, gt=0, description="seconds until the server must answer")
    extra_args: list[str] = Field(default=[], description="further arguments of SGLang's command line, last")
