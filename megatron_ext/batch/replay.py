"""Router replay: each router selects the experts that the rollout engine selected, and keeps its own gate weights.

Megatron-Core's RouterReplay holds, per router, the indices to replay. Here each router gets one that also knows which
rows are missing (those tokens route natively, and are counted) and how often the native selection would have agreed.
Only the selection is replayed: the gate weights come from the live scores, so the router still learns.

A floor may refuse an expert: where its live probability is below `floor` times that of the weakest native one, the
strongest native expert that the token does not have yet takes its place. Such tokens are counted.

State is set per model chunk, right before its forward, and never outlives `replaying`:
    forward    REPLAY_FORWARD with the micro-batch's routes (R2: those that an earlier forward recorded; R3: the
               rollout engine's), or RECORD
    backward   REPLAY_BACKWARD from a hook on the output's gradient; recomputed forwards pop the routes in order
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ext.batch.routes import MISSING
from megatron_ext.config import replay_conflict
from megatron_ext.mcore import GPTModel, RouterReplay, RouterReplayAction

COUNTS = 4
"""See LayerReplay.counts."""


class LayerReplay(RouterReplay):
    """Megatron-Core's per-router replay, with missing rows and counters.

    counts:    [4] int64 on the device of the routers, or None before the first: tokens replayed, of these with the same
               native expert set, tokens that fell back, tokens of which the floor refused an expert. To read them is to
               wait for the device.
    floor:     see the head of this file; None refuses nothing.
    of_logits: whether the scores that are chosen by are logits, and not probabilities.
    bias:      gives what was added to the probabilities before the choice, [experts] or None.
    """

    def __init__(
        self, floor: float | None = None, *, of_logits: bool = False, bias: Callable[[], Tensor | None] = lambda: None
    ):
        super().__init__()
        RouterReplay.global_router_replay_instances.remove(self)  # that list mixes models and chunks
        self.floor, self.of_logits, self.bias = floor, of_logits, bias
        self.counted: Tensor | None = None
        self.counts: Tensor | None = None

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """(scores of the selection, selection), both [tokens, topk], as the action says."""
        assert default_compute_topk is not None
        replaying = self.router_replay_action in (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD)
        if not replaying:
            return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)
        first = self.router_replay_action == RouterReplayAction.REPLAY_FORWARD
        target = self.target_topk_idx if first else self.replay_backward_list.pop(0)
        if target is None or target.shape != (len(scores), topk):
            shape = None if target is None else tuple(target.shape)
            raise RuntimeError(
                f"layer {self.layer_number}: routes of shape {shape} to replay for {len(scores)} tokens, top {topk}"
            )
        # A missing row is -1 in its first place, so that it travels with the indices through recomputation.
        missing = target[:, 0] == MISSING
        _, native = default_compute_topk(scores.detach(), topk, num_groups=num_groups, group_topk=group_topk)
        given = torch.where(missing[:, None], native, target)
        selection, refused = given, torch.zeros_like(missing)
        if self.floor is not None:
            selection, refused = self._above_floor(scores.detach(), given, native)
        if first:
            self._count(given, native, missing, refused)
        return scores.gather(1, selection), selection

    def _above_floor(self, scores: Tensor, given: Tensor, native: Tensor) -> tuple[Tensor, Tensor]:
        """(selection [tokens, topk], tokens with a refused expert [tokens] bool). A native expert is never refused."""
        assert self.floor is not None
        bias = self.bias()
        live = scores if bias is None else scores - bias
        weakest = live.gather(1, native).amin(-1, keepdim=True)
        least = weakest + math.log(self.floor) if self.of_logits else weakest * self.floor
        refused = live.gather(1, given) < least
        # First what is kept, then native experts by their scores; there are always enough of the two.
        rank = torch.full_like(scores, -torch.inf).scatter(1, native, scores.gather(1, native))
        rank = rank.scatter(1, given, rank.gather(1, given).masked_fill(~refused, torch.inf))
        some = refused.any(-1)
        return torch.where(some[:, None], rank.topk(given.shape[1], -1).indices, given), some

    def _count(self, given: Tensor, native: Tensor, missing: Tensor, refused: Tensor) -> None:
        assert self.counted is not None
        same = (native[:, :, None] == given[:, None, :]).any(-1).all(-1)  # native names no expert twice
        replayed = self.counted & ~missing
        kinds = (replayed, replayed & same, self.counted & missing, self.counted & refused)
        counts = torch.stack([kind.sum() for kind in kinds])
        self.counts = counts if self.counts is None else self.counts + counts


class ChunkReplay:
    """The replay of one model chunk's routers. floor: see the head of this file."""

    def __init__(self, chunk: GPTModel, floor: float | None = None):
        self.layers: list[tuple[int, LayerReplay]] = []
        for layer in chunk.decoder.layers:
            router = getattr(layer.mlp, "router", None)
            if router is not None and router.router_replay is not None:
                if (problem := replay_conflict(vars(router.config))) is not None:
                    raise ValueError(problem)
                RouterReplay.global_router_replay_instances.remove(router.router_replay)
                softmax_last = router.config.moe_router_score_function == "softmax" and not (
                    router.config.moe_router_pre_softmax
                )
                router.router_replay = LayerReplay(
                    floor, of_logits=softmax_last, bias=partial(getattr, router, "expert_bias", None)
                )
                router.router_replay.layer_number = layer.layer_number
                self.layers.append((layer.layer_number - 1, router.router_replay))

    def set(self, routes: Tensor, counted: Tensor, *, recompute: bool) -> None:
        """Arm the routers for the next forward of this chunk.

        routes:    [tokens, layers of the whole model, topk] integers, this rank's tokens; -1 where a row is missing.
        counted:   [tokens] bool, real tokens. The rows of others are taken for missing, whatever stands there.
        recompute: keep the routes for a forward that backward will repeat.
        """
        for layer, replay in self.layers:
            indices = routes[:, layer].to(torch.int64).masked_fill(~counted[:, None], MISSING)
            replay.target_topk_idx = indices
            if recompute:
                replay.replay_backward_list.append(indices)
            replay.counted = counted
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def record(self) -> None:
        """Let the next forward of this chunk route natively and keep what it selects."""
        for _, replay in self.layers:
            replay.set_router_replay_action(RouterReplayAction.RECORD)

    def take_recorded(self) -> dict[int, Tensor]:
        """What the last forward selected, by layer of the whole model: [tokens, topk] int64."""
        out = {}
        for layer, replay in self.layers:
            assert replay.recorded_topk_idx is not None
            out[layer], replay.recorded_topk_idx = replay.recorded_topk_idx, None
        return out

    def switch_in_backward(self, output: Tensor) -> None:
        """From the moment the gradient of `output` arrives, recomputed forwards pop the queued routes."""

        def switch(_grad: Tensor) -> None:
            for _, replay in self.layers:
                replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

        if output.requires_grad:
            output.register_hook(switch)

    def clear(self) -> None:
        """Leave nothing behind."""
        for _, replay in self.layers:
            replay.clear_indices()
            replay.clear_router_replay_action()
            replay.counted = None

    def take_counts(self) -> dict[int, tuple[int, ...]]:
        """Counters by global layer since the last call."""
        counted = {layer: replay.counts for layer, replay in self.layers if replay.counts is not None}
        for _, replay in self.layers:
            replay.counts = None
        numbers = torch.stack(list(counted.values())).tolist() if counted else []  # waits once, for all layers
        taken = {layer: tuple(row) for layer, row in zip(counted, numbers, strict=True)}
        return {layer: taken.get(layer, (0,) * COUNTS) for layer, _ in self.layers}


@contextlib.contextmanager
def replaying(chunks: Sequence[ChunkReplay]) -> Iterator[None]:
    """Within, chunks may be armed; on leaving, whatever happened, no router holds routes or an action.

    Raises RuntimeError where recomputation left queued routes unused: then some forward ran with the wrong ones.
    """
    try:
        yield
        left = sum(len(replay.replay_backward_list) for chunk in chunks for _, replay in chunk.layers)
        if left:
            raise RuntimeError(f"{left} queued routes were not consumed by recomputation")
    finally:
        for chunk in chunks:
            chunk.clear()
