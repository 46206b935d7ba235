"""The model that a run begins with, and the one that teaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from megatron_ext.config import Frozen
from pipeline.config.server import ServerConfig

TinyTokenizer = Literal["characters", "bytes"]
TINY_VOCABULARIES: dict[TinyTokenizer, int] = {"characters": 64, "bytes": 320}
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2


class TinyModelConfig(Frozen):
    """Shape of a tiny model. The vocabulary is its tokenizer's; embeddings are not tied."""

    layers: int = Field(4, ge=1, description="decoder layers")
    hidden: int = Field(64, ge=8, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="query heads")
    kv_heads: int = Field(2, ge=1, description="key-value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(32, ge=2, description="width of a head; even, for the rotary embedding")
    experts: int = Field(8, ge=0, description="experts a layer; 0: a dense Qwen3")
    topk: int = Field(2, ge=1, description="experts a token")
    moe_intermediate: int = Field(128, ge=1, description="inner width of an expert")
    intermediate: int = Field(256, ge=1, description="inner width of the feed-forward of a dense model")
    max_positions: int = Field(4096, ge=1, description="longest sequence, tokens")
    tokenizer: TinyTokenizer = Field(
        "characters",
        description="characters: 64 ids, for the synthetic tasks (digits, small letters, signs); bytes: 320 ids, for "
        "any text",
    )
    init_std: float = Field(0.1, gt=0, description="standard deviation of every random weight; norms start at 1")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if self.experts and self.topk > self.experts:
            raise ValueError(f"topk={self.topk} is more than experts={self.experts}; lower topk")
        return self

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, and rows of both embeddings."""
        return TINY_VOCABULARIES[self.tokenizer]

    def hf_config(self) -> dict[str, Any]:
        """The content of config.json, as transformers 5 writes it."""
        config: dict[str, Any] = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": BOS_ID,
            "dtype": "float32",
            "eos_token_id": EOS_ID,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": self.init_std,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": PAD_ID,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }
        if not self.experts:
            return config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        return config | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.moe_intermediate,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": self.topk,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }


class ModelConfig(Frozen):
    """The model: a Hugging Face directory, or a tiny one made on the spot."""

    path: Path | None = Field(None, description="Hugging Face model directory")
    trust_remote_code: bool = Field(
        False,
        description="run the Python code that a model directory brings for its tokenizer (`auto_map`), here and in the "
        "server; read it first",
    )
    tiny: TinyModelConfig | None = Field(None, description="make a random Qwen3 or Qwen3-MoE of this shape instead")

    @model_validator(mode="after")
    def _one(self):
        if (self.path is None) == (self.tiny is None):
            raise ValueError(
                "give exactly one of model.path (a Hugging Face directory) and model.tiny (made on the spot)"
            )
        return self


class TeacherConfig(Frozen):
    """A model that scores what the policy samples, where objective.distillation learns from it."""

    path: Path | None = Field(
        None,
        description="a Hugging Face directory, a run directory (its trained model, else its newest checkpoint) or a "
        "checkpoint; beside `url`, a folder with config.json and tokenizer of what that server holds",
    )
    engine: Literal["server", "trainer"] = Field(
        "server",
        description="server: an SGLang server of its own scores answers as they end; trainer: a network beside the "
        "policy scores a step's batch",
    )
    url: str | None = Field(
        None, description="of an SGLang server that holds the teacher already, started by somebody else"
    )
    api_key: str | None = Field(None, description="that opens it", json_schema_extra={"secret": True})
    server: ServerConfig = Field(
        default_factory=ServerConfig,  # pyright: ignore[reportArgumentType]
        description="of a server that the run starts; replicas: null is one",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.path is None and self.url is None:
            raise ValueError("give teacher.path (a model directory, a run or a checkpoint), or teacher.url")
        if self.url is not None and self.engine == "trainer":
            raise ValueError("teacher.url names a server, and teacher.engine=trainer wants none; leave one of them out")
        if self.url is not None and not _is_address(self.url):
            raise ValueError(f"teacher.url={self.url} is no address; write http://HOST:PORT")
        if self.server.port is not None and (self.server.replicas or 1) > 1:
            raise ValueError("several servers cannot listen on one port; set teacher.server.port=null")
        return self


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or none of TCP
        return False
