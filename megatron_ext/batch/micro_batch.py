"""Samples become what the model reads: one micro-batch of this rank, on its device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.batch.layout import Sample, TokenLayout
from megatron_ext.batch.routes import check_routes
from megatron_ext.hf.description import ModelDescription
from megatron_ext.mcore import PackedSeqParams


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank. Without indices it is padding that keeps the ranks in step.

    indices:   which samples of the call these are, and the samples.
    tokens, positions: [rows, tokens / cp] int64.  labels: [rows * tokens / cp] int64.
    packed:    where the sequences lie in a packed row; None for padded rows.
    routes:    [this rank's tokens, layers, topk] int16 in the routers' order, -1 where there is no row to replay.
    counted:   [this rank's tokens] bool, in the routers' order: real tokens.
    kept:      [rows * tokens / cp, K] int32, token ids that each label was sampled from, -1 behind them; a row of -1
               for the whole vocabulary. None: so are all.
    answered:  [n] int64, the places of `labels` that belong to responses; at least one place, whatever it is.
    named:     [rows * tokens / cp, k] int32, further ids whose log-probs are read, -1 for none. None: nowhere.
    """

    indices: tuple[int, ...]
    samples: tuple[Sample, ...]
    layout: TokenLayout
    tokens: Tensor
    labels: Tensor
    positions: Tensor
    packed: PackedSeqParams | None
    routes: Tensor | None
    counted: Tensor
    kept: Tensor | None
    answered: Tensor
    named: Tensor | None = None


def make_micro_batch(
    indices: Sequence[int],
    samples: Sequence[Sample],
    layout: TokenLayout,
    device: torch.device,
    routed: ModelDescription | None,
    label_shift: int = 0,
) -> MicroBatch:
    """Lay the chosen samples out.

    samples:     of the whole call.
    layout:      of the chosen ones' input lengths, or of the single length 1 where there are none: ranks meet in
                 collectives, so a rank without samples runs one padding sequence that nothing reads.
    routed:      the model whose routes are to be replayed, or None. Rows of its dense layers are not read.
    label_shift: see exchange.Exchange.
    Raises ValueError for routes that are not the model's.
    """
    chosen = tuple(samples[i] for i in indices)
    inputs = [s.tokens[:-1].astype(np.int64) for s in chosen] or [np.zeros(1, np.int64)]
    labels = [_following(s.tokens, label_shift).astype(np.int64) for s in chosen] or [np.zeros(1, np.int64)]
    packed = None
    if layout.packed:
        cu, longest = layout.cu_seqlens.to(device), max(layout.padded_lengths)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest
        )
    routes = None if routed is None else _routes(chosen, layout, routed).to(device)
    return MicroBatch(
        indices=tuple(indices),
        samples=chosen,
        layout=layout,
        tokens=layout.slice_context(layout.pack(inputs)).to(device).view(layout.rows, -1),
        labels=layout.slice_context(layout.pack(labels)).to(device),
        positions=layout.slice_context(layout.positions).to(device).view(layout.rows, -1),
        packed=packed,
        routes=routes,
        counted=layout.slice_sequence(layout.is_token & bool(chosen)).to(device),
        kept=_of_labels("kept", chosen, layout, device, label_shift),
        answered=_answered(chosen, layout).to(device),
        named=_of_labels("named", chosen, layout, device, label_shift),
    )


def _answered(samples: Sequence[Sample], layout: TokenLayout) -> Tensor:
    """See MicroBatch.answered."""
    rows = [np.arange(s.input_length) >= s.prompt_length - 1 for s in samples] or [np.zeros(1, bool)]
    places = layout.slice_context(layout.pack(rows)).nonzero()[:, 0]
    return places if len(places) else places.new_zeros(1)  # a rank of padding, or of a prompt's part


def _of_labels(
    name: str, samples: Sequence[Sample], layout: TokenLayout, device: torch.device, shift: int
) -> Tensor | None:
    """See MicroBatch.kept and named: [N, K] of each sample that has some."""
    given: list[np.ndarray | None] = [getattr(sample, name) for sample in samples]
    widest = max((ids.shape[1] for ids in given if ids is not None), default=0)
    if not widest:
        return None
    rows = []
    for sample, ids in zip(samples, given, strict=True):
        of_tokens = np.full((len(sample.tokens), widest), -1, np.int32)
        if ids is not None:
            of_tokens[sample.prompt_length :, : ids.shape[1]] = ids
        rows.append(_following(of_tokens, shift))
    return layout.slice_context(layout.pack(rows, fill=-1)).to(device)


def _following(of_tokens: np.ndarray, shift: int) -> np.ndarray:
    """[tokens, ...] -> [tokens - 1, ...]: what each input token is to predict, the token that follows it."""
    if not shift:
        return of_tokens[1:]
    following = np.arange(1, len(of_tokens)) + shift
    return of_tokens[following.clip(0, len(of_tokens) - 1)]


def _routes(samples: Sequence[Sample], layout: TokenLayout, model: ModelDescription) -> Tensor:
    """[this rank's tokens, layers, topk] int16, -1 where there is no row to replay."""
    rows, shape = [], (model.num_layers, model.topk)
    for n, sample in itertools.zip_longest(layout.lengths, samples):
        if sample is None or sample.routes is None:
            rows.append(np.full((n, *shape), -1, np.int16))
            continue
        routes = np.asarray(sample.routes)  # those that lie elsewhere are fetched here, by the ranks that read them
        check_routes(routes, model)
        rows.append(routes.astype(np.int16))
    return layout.slice_sequence(layout.pack(rows, fill=-1))
