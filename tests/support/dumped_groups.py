"""Steps as they are dumped, of a model of 3 layers with 8 experts."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_ext.hf.description import describe
from pipeline.config.model import TinyModelConfig
from pipeline.dumps.dump import Dump
from pipeline.dumps.groups import FINISH_REASONS
from pipeline.step import Batch
from pipeline.teaching.teacher_scores import TeacherScores
from pipeline.types import Prompt, Rollout
from tests.support.episodes import graded_group

LAYERS, TOPK, EXPERTS, VOCAB = 3, 2, 8, 50
SHAPE = describe(
    {
        **TinyModelConfig(layers=LAYERS, experts=EXPERTS, topk=TOPK).hf_config(),
        "vocab_size": VOCAB,
    }
)  # fmt: skip


def make_group(rng, index=0, prompt_length=4, lengths=(3, 1), routes=np.uint8, metadata=None, kept=False, top_k=None):
    ids = rng.integers(0, VOCAB, prompt_length).astype(np.int32)
    rollouts = []
    for n in lengths:
        shape = (prompt_length + n - 1, LAYERS, EXPERTS)
        rows = None if routes is None else rng.random(shape).argsort(-1)[..., :TOPK].astype(routes)
        rollouts.append(
            Rollout(
                prompt_ids=ids,
                response_ids=(ids_of_response := rng.integers(0, VOCAB, n).astype(np.int32)),
                rollout_logprobs=-rng.random(n).astype(np.float32),
                routes=None if routes is None else rows.astype(routes),
                weight_versions=rng.integers(0, 9, n).astype(np.int32),
                finish_reason=FINISH_REASONS[int(rng.integers(3))],
                kept=make_kept(rng, ids_of_response) if kept else None,
                retractions=int(rng.integers(3)),
                mixed_kv=marks if (marks := rng.random(n) < 0.3).any() else None,
                teacher=make_scores(rng, n, top_k) if top_k is not None and rng.random() < 0.6 else None,
            )
        )
    prompt = Prompt(ids, f"prompt {index} <|é\u2028", metadata if metadata is not None else {"answer": "1"}, index)
    rewards = rng.normal(size=len(lengths)).astype(np.float32).tolist()
    return graded_group(prompt, rollouts, rewards)


def make_kept(rng, ids):
    """Up to four tokens beside each, its own among them."""
    rows = [rng.permutation(np.unique(np.append(rng.integers(0, VOCAB, rng.integers(5)), i))) for i in ids]
    out = np.full((len(ids), max(map(len, rows), default=1)), -1, np.int32)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = tokens
    return out


def make_scores(rng, n, top_k):
    """Of a teacher, with its likeliest tokens or without."""
    logprobs = -rng.random(n).astype(np.float32)
    if not top_k:
        return TeacherScores(logprobs)
    tops = rng.random((n, VOCAB)).argsort(-1)[:, :top_k].astype(np.int32)
    return TeacherScores(logprobs, tops, -rng.random((n, top_k)).astype(np.float32))


def make_dump(*groups, step=1):
    return Dump(Batch(step, 1, groups), 1.0)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
