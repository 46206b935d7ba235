"""Weights that change under running requests, and what transformers says of tokens of several versions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from pipeline.config.weights import WeightsConfig
from pipeline.engine.control import ServerAddress
from pipeline.engine.server import ServerError
from pipeline.types import Rollout
from pipeline.weights import WeightSender, WeightTransferError


@dataclass
class Alternating:
    """Stands for the trainer: version v are the weights in folders[v % 2], sent as a trainer sends them.

    between_buckets: called once, in the middle of the next transfer.
    """

    folders: Sequence[Path]
    senders: dict[tuple[str, ...], WeightSender] = field(default_factory=dict)
    sent: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    timeout_s: float = 20.0
    between_buckets: Callable[[], None] | None = None

    def send_weights(self, version: int, servers: Sequence[ServerAddress], *, flush: bool) -> None:
        urls = tuple(server.url for server in servers)
        self.sent.append((version, urls))
        try:
            if urls not in self.senders:
                config = WeightsConfig(timeout_s=self.timeout_s, checksum_every=0)
                self.senders[urls] = WeightSender(servers, config, device="cpu")
                self.senders[urls].connect()
            self.senders[urls].send(self._buckets(version), version, flush=flush)
        except WeightTransferError as error:
            del self.senders[urls]
            raise ServerError(str(error)) from error

    def _buckets(self, version: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        tensors = list(load_file(self.folders[version % 2] / "model.safetensors").items())
        yield tensors[:100]
        if self.between_buckets is not None:
            act, self.between_buckets = self.between_buckets, None
            act()
        yield tensors[100:]

    def send_again(self, version: int, servers: Sequence[ServerAddress]) -> bool:
        self.send_weights(version, servers, flush=True)
        return True


def versions_of_rows(rollout: Rollout) -> np.ndarray:
    """[P + N - 1]: the version that each token was read under: that of the next token, where it was sampled."""
    versions = np.concatenate([np.full(len(rollout.prompt_ids), -1), rollout.weight_versions])[1:]
    for row in reversed(range(len(versions) - 1)):  # what nobody sampled was read with what came after it
        if versions[row] < 0:
            versions[row] = versions[row + 1]
    return versions


@torch.no_grad()
def _pass(model, ids, cache=None):
    """Log-probs [T, vocabulary], routes [T, layers, topk] and their gaps [T, layers] of tokens behind a cache."""
    out = model(torch.tensor(np.asarray(ids, np.int64))[None], past_key_values=cache, output_router_logits=True)
    logits = torch.stack(out.router_logits, 1)
    topk = model.config.num_experts_per_tok
    best = logits.topk(topk + 1, -1)
    gaps = best.values[..., topk - 1] - best.values[..., topk]
    return torch.log_softmax(out.logits[0], -1).numpy(), best.indices[..., :topk].numpy(), gaps.numpy()


def expected(models, rollout: Rollout, *, over_old_kv: bool):
    """Log-probs [P + N - 1], of each next token, routes and gaps.

    over_old_kv: each token is read over the keys and values that the passes before it left, of whatever weights; else
    by a pass over the whole prefix under its own version.
    """
    ids, versions = rollout.token_ids, versions_of_rows(rollout)
    logprobs, routes, gaps = [], [], []
    if over_old_kv:
        cache, cuts = DynamicCache(), [0, *(np.flatnonzero(np.diff(versions)) + 1), len(versions)]
        for start, end in itertools.pairwise(cuts):
            for out, part in zip(
                (logprobs, routes, gaps), _pass(models[versions[start] % 2], ids[start:end], cache), strict=True
            ):
                out.append(part)
        table, routes, gaps = (np.concatenate(part) for part in (logprobs, routes, gaps))
    else:
        passes = [_pass(model, ids[:-1]) for model in models]
        rows = np.arange(len(versions))
        table, routes, gaps = (np.stack([p[i] for p in passes])[versions % 2, rows] for i in range(3))
    return table[np.arange(len(versions)), ids[1:]], routes, gaps


def must_equal(models, rollout: Rollout, *, over_old_kv: bool = False, last: int | None = None) -> None:
    """Log-probs and routes of a rollout, or of its last tokens, are those of its versions. Raises AssertionError where
    one is not."""
    tolerance, first = 1e-4, 0 if last is None else len(rollout.token_ids) - 1 - last
    logprobs, routes, gaps = expected(models, rollout, over_old_kv=over_old_kv)
    sampled = rollout.trained & (np.arange(len(rollout)) >= first - len(rollout.prompt_ids) + 1)
    error = np.abs(logprobs[len(rollout.prompt_ids) - 1 :] - rollout.rollout_logprobs)[sampled].max()
    assert error < tolerance, f"log-probs differ by {error}"
    same = (np.sort(rollout.routes, -1) == np.sort(routes, -1)).all(-1)
    wrong = first + np.argwhere((~same & (gaps > 1e-4))[first:])
    assert len(wrong) == 0, f"routes differ at {wrong[:5].tolist()} of {same.shape}"
