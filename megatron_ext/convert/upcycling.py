"""A dense model becomes a mixture of experts that computes the same: sparse upcycling (2212.05055), granular experts
by virtual groups (2410.07524, section 3).

With F inner elements of the dense feed-forward f, S of them for the shared expert, and G the granularity, the other
F - S are cut into G slices, and slice j of copy c is expert c G + j. Router rows are the same within a copy. So the K
best experts are K/G whole copies, their weights sum to 1, and

    f(x) = 2 sigmoid(0 x) f_S(x) + sum over the chosen of w_e G f_e(x)

which is what is written: the output matrices times G and times 2, the shared expert's gate 0. K/G (F - S) + S inner
elements are active: with K = G as many as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.convert.comparison import TORCH_DTYPES, Comparison, compare, source_dtype
from megatron_ext.convert.output import keep_apart, output_directory, progress, size_text
from megatron_ext.hf.companions import Dtype, write_companions
from megatron_ext.hf.description import ModelDescription, UnsupportedModel, describe, read_description
from megatron_ext.hf.families import FAMILIES
from megatron_ext.hf.families.family import ExpertShape
from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.tables import LAYER, LM_HEAD
from megatron_ext.hf.tied import EMBEDDING_NAME, HEAD_NAME, check_tied_head
from megatron_ext.hf.writer import write_weights

_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
)  # fmt: skip
"""Fields of config.json that mean the same in a dense and in a sparse model."""
_DENSE = (LAYER + "mlp.linear_fc1.weight", LAYER + "mlp.linear_fc2.weight")
_EXPERT = (LAYER + "mlp.experts.linear_fc1.weight{expert}", LAYER + "mlp.experts.linear_fc2.weight{expert}")
_SHARED = (LAYER + "mlp.shared_experts.linear_fc1.weight", LAYER + "mlp.shared_experts.linear_fc2.weight")
_ROUTER, _GATE = LAYER + "mlp.router.weight", LAYER + "mlp.shared_experts.gate_weight"


@dataclass(frozen=True)
class Recipe:
    """experts, topk: of a layer. granularity: slices that the feed-forward is cut into. shared: inner elements of the
    shared expert. noise: each routed weight is multiplied by 1 + noise N(0, 1). router_std: of the router's weights.
    """

    experts: int
    topk: int
    granularity: int = 1
    shared: int = 0
    noise: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    def shape(self, ffn: int) -> ExpertShape:
        """Of a dense feed-forward with so many inner elements. Raises ValueError where they do not go together."""
        g, routed = self.granularity, ffn - self.shared
        for name, value in (("--experts", self.experts), ("--topk", self.topk), ("--granularity", g)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.topk > self.experts:
            raise ValueError(f"--topk {self.topk} is more than --experts {self.experts}; lower it")
        for name, value in (("--experts", self.experts), ("--topk", self.topk)):
            if value % g:
                raise ValueError(
                    f"{name} {value} is no multiple of --granularity {g}: a token takes all {g} slices of the "
                    f"feed-forward or none; write a multiple of {g}"
                )
        if not 0 <= self.shared < ffn:
            raise ValueError(f"--shared-width must be of 0 to {ffn - 1}, of the feed-forward's {ffn} inner elements")
        if routed % g:
            raise ValueError(f"{routed} inner elements do not divide into --granularity {g} slices; use a divisor")
        if self.noise < 0 or self.router_std <= 0:
            raise ValueError("--noise must be 0 or more, and --router-std above 0")
        return ExpertShape(self.experts, self.topk, routed // g, self.shared)


def sparse_config(dense: ModelDescription, recipe: Recipe) -> dict[str, Any]:
    """config.json of the mixture. Raises UnsupportedModel where no family holds it, ValueError as `Recipe.shape`."""
    if dense.num_experts:
        raise UnsupportedModel(f"{dense.model_type} has experts already; upcycling begins with a dense model")
    shape = recipe.shape(dense.ffn)
    alike = {
        name: family.sparse
        for name, family in FAMILIES.items()
        if family.sparse and family.sparse.qk_norm == dense.qk_norm and dense.qkv_biased in family.sparse.qkv_biased
    }
    fit = {name: sparse for name, sparse in alike.items() if sparse.shared == (recipe.shared > 0)}
    if not fit:
        with_shared = any(sparse.shared for sparse in alike.values())
        raise UnsupportedModel(
            f"{dense.model_type} becomes {' or '.join(alike) or 'no family that is built here'}"
            + (", which has a shared expert; give its width, --shared-width" if with_shared else "")
            + (", which has no shared expert; leave --shared-width out" if alike and not with_shared else "")
        )
    name, sparse = next(iter(fit.items()))
    if not FAMILIES[name].server_heads and dense.head_dim != (width := dense.hidden // dense.heads):
        raise UnsupportedModel(
            f"head_dim={dense.head_dim}: a {dense.model_type} becomes {name}, to which SGLang gives heads of "
            f"hidden_size / num_attention_heads = {width}: no server would hold it; take a dense model with such "
            "heads, or a qwen3, whose qwen3_moe may have any"
        )
    kept = {key: dense.hf[key] for key in _KEPT if key in dense.hf}
    own = {
        "architectures": [sparse.architecture],
        "model_type": name,
        "head_dim": dense.head_dim,
        "rope_parameters": dense.rope,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": False,
    }
    return kept | own | sparse.config(shape, dense.qkv_biased)


class UpcycledTensors:
    """The Hugging Face tensors of the mixture, made a tensor at a time; of the dense model one layer's feed-forward is
    held. The same recipe gives the same values, however often they are asked for."""

    def __init__(
        self, files: TensorFiles, dense: ModelDescription, sparse: ModelDescription, recipe: Recipe, dtype: Dtype
    ):
        """Raises KeyError for tensors that are missing, or that have no place, and ValueError for another shape."""
        self.files, self.dense, self.recipe, self.dtype = files, dense, recipe, TORCH_DTYPES[dtype]
        self.shape = recipe.shape(dense.ffn)
        self.rows = {row.megatron: row for row in sparse.family.table}
        self._check()

    def outputs(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor without storage) of everything that `stream` gives, in its order."""
        return self._tensors(lambda name: torch.empty(self.files.shapes[name], device="meta"))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), each once."""
        return self._tensors(self.files.read)

    def active(self) -> int:
        """Parameters that a token meets, embedding and LM head included."""
        idle = (self.shape.experts - self.shape.topk) * 3 * self.dense.hidden * self.shape.width
        return sum(tensor.numel() for _, tensor in self.outputs()) - self.dense.num_layers * idle

    def _dense_names(self, layer: int) -> list[str]:
        """Gate, up and down."""
        rows = {row.megatron: row for row in self.dense.family.table}
        return [name for key in _DENSE for name in rows[key].hf_names(layer, None)]

    def _check(self) -> None:
        width, ffn, rows = self.dense.hidden, self.dense.ffn, self.dense.family.table
        shapes = {EMBEDDING_NAME: (self.dense.vocab_size, width)}
        if not self.dense.tied_embeddings:
            shapes[HEAD_NAME] = (self.dense.vocab_size, width)
        for layer in range(self.dense.num_layers):
            for name, shape in zip(self._dense_names(layer), [(ffn, width), (ffn, width), (width, ffn)], strict=True):
                shapes[name] = shape
        known = {n for row in rows for layer in range(self.dense.num_layers) for n in row.hf_names(layer, None)}
        names = self.files.files.keys()
        # What one layer has (biases, norms) every layer has.
        patterns = [
            n for row in rows for n in row.hf if any(n.format(layer=i) in names for i in range(self.dense.num_layers))
        ]
        every = {n.format(layer=i) for n in patterns for i in range(self.dense.num_layers)} - {HEAD_NAME}
        if missing := sorted((every | shapes.keys()) - names):
            raise KeyError(f"{self.files.path} lacks tensors of {self.dense.model_type}: {', '.join(missing)}")
        if unknown := sorted(names - known):
            raise KeyError(
                f"{self.files.path} holds tensors that {self.dense.model_type} has no place for: {', '.join(unknown)}"
            )
        for name, shape in shapes.items():
            if self.files.shapes[name] != shape:
                raise ValueError(f"{name} is {list(self.files.shapes[name])}; the model has {list(shape)}")

    def _tensors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        mlp = {name for layer in range(self.dense.num_layers) for name in self._dense_names(layer)}
        for name in sorted(self.files.files.keys() - mlp - {HEAD_NAME}):
            yield name, read(name).to(self.dtype)
        head = EMBEDDING_NAME if self.dense.tied_embeddings else HEAD_NAME
        yield LM_HEAD.hf[0], read(head).to(self.dtype)
        for layer in range(self.dense.num_layers):
            dense = [read(name) for name in self._dense_names(layer)]
            yield from ((name, tensor.to(self.dtype)) for name, tensor in self._layer(layer, dense))

    def _layer(self, layer: int, dense: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Router, experts, shared expert. dense: gate and up [F, hidden], down [hidden, F]."""
        shape, slices, device = self.shape, self.recipe.granularity, dense[0].device
        rows = self._random((shape.experts // slices, self.dense.hidden), device, layer, shape.experts, 0)
        yield self._name(_ROUTER, layer), (rows * self.recipe.router_std).repeat_interleave(slices, 0)
        for expert in range(shape.experts):
            start = shape.shared + expert % slices * shape.width
            tensors = _cut(dense, start, start + shape.width, slices)
            for number, (name, tensor) in enumerate(zip(self._names(_EXPERT, layer, expert), tensors, strict=True)):
                yield name, self._noisy(tensor, layer, expert, number)
        if shape.shared:
            names = self._names(_SHARED, layer)
            yield from zip(names, _cut(dense, 0, shape.shared, 2), strict=True)
            yield self._name(_GATE, layer), torch.zeros(1, self.dense.hidden, device=device)

    def _name(self, row: str, layer: int) -> str:
        return self._names((row,), layer)[0]

    def _names(self, rows: tuple[str, ...], layer: int, expert: int | None = None) -> list[str]:
        return [name for row in rows for name in self.rows[row].hf_names(layer, expert)]

    def _noisy(self, tensor: Tensor, *place: int) -> Tensor:
        if not self.recipe.noise:
            return tensor
        return tensor.float() * (1 + self.recipe.noise * self._random(tuple(tensor.shape), tensor.device, *place))

    def _random(self, shape: tuple[int, ...], device: torch.device, *place: int) -> Tensor:
        """Normal numbers of a place in the model, float32."""
        if device.type == "meta":
            return torch.empty(shape, device=device)
        seed = int(np.random.SeedSequence([self.recipe.seed, *place]).generate_state(1, np.uint64)[0])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed % (1 << 63)))


def _cut(dense: list[Tensor], start: int, end: int, scale: int) -> list[Tensor]:
    """Inner elements start .. end of gate, up and down, the last times `scale`."""
    gate, up, down = dense
    part = down[:, start:end]
    return [gate[start:end], up[start:end], part * scale if scale != 1 else part]


@dataclass(frozen=True)
class Upcycled:
    """What was made: parameters, and of these the active ones. notes: what the server would do otherwise."""

    out: Path
    model: ModelDescription
    dtype: Dtype
    nbytes: int
    parameters: int
    active: int
    seconds: float
    untied: bool
    notes: list[str]
    compared: Comparison | None

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.model.model_type} of {self.model.num_experts} experts, {self.model.topk} a token, "
            f"{self.parameters:,} parameters, {self.active:,} active; "
            f"{size_text(self.nbytes)} of {self.dtype} in {self.seconds:.1f} s"
        ]
        if self.untied:
            lines.append("the LM head, which was the embedding, is a copy of it: the two are trained apart")
        lines += [f"not for a run with a server: {note}" for note in self.notes]
        equal = (
            "not compared" if self.compared is None else f"read back: {self.compared.tensors} tensors as they were made"
        )
        return "\n".join([*lines, equal])


def upcycle(
    dense_dir: Path,
    out: Path,
    recipe: Recipe,
    *,
    dtype: Dtype | None = None,
    shard_bytes: int = 1 << 30,
    verify: bool = True,
    overwrite: bool = False,
) -> Upcycled:
    """A dense model directory into that of a mixture, whole or not at all. dtype: None is the source's.

    Raises ValueError, KeyError and FileNotFoundError before anything is written, and OutputError and ConversionError.
    """
    began = time.monotonic()
    keep_apart(dense_dir, out)
    dense = read_description(dense_dir)
    config = sparse_config(dense, recipe)
    sparse = describe(config, "the mixture's config.json")
    check_tied_head(dense_dir, dense)
    files = TensorFiles(dense_dir)
    dtype = dtype or source_dtype(files)
    made = UpcycledTensors(files, dense, sparse, recipe, dtype)
    count = sum(tensor.numel() for _, tensor in made.outputs())
    nbytes, compared = count * TORCH_DTYPES[dtype].itemsize, None
    with output_directory(out, needed_bytes=nbytes, overwrite=overwrite) as partial:
        with progress("writing", nbytes) as advance:
            write_weights(made.outputs(), made.stream(), partial, shard_bytes=shard_bytes, done=advance)
        write_companions(dense_dir, partial, dtype)
        text = json.dumps(config | {"dtype": dtype}, indent=2) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        if verify:
            with progress("comparing", nbytes) as advance:
                compared = compare(made, TensorFiles(partial), to_hf=True, advance=advance)
    seconds, tied = time.monotonic() - began, dense.tied_embeddings
    return Upcycled(out, sparse, dtype, nbytes, count, made.active(), seconds, tied, sparse.not_served(), compared)
