"""The rollout engine: what fits into a server's KV cache, how fast it decodes, and how long a batch of answers takes.

A decoding step of B sequences on one server of `tp` GPUs reads the weights that its tokens meet and their KV cache:

    bytes = W_dense + W_expert E (1 - (1 - k/E)^B) + B c kv        E (1 - (1 - k/E)^B) distinct experts of B draws of k
    time  = max(bytes / (bandwidth), FLOPs / (FLOP/s)) + layers * launch

Where it spans m machines, the two all-reduces of a layer move 2 (m-1)/m B hidden values between them, over the adapters
of a machine's GPUs at once, and wait each time for the network. It is bound by bandwidth until hundreds of sequences
run at once (the roofline of 2211.05102, section 2). Answers end one by one, the batch shrinks, and the longest of them
sets the end: `generate` follows that event by event.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.hf.description import ModelDescription
from pipeline.plan.counts import flops
from pipeline.plan.counts.parameters import delta_state, expert, indexer, kv_cache, total
from pipeline.plan.hardware import EFFICIENCY, GPU, Efficiency

_SERVERS = 24  # whose rollout is followed event by event; the others are like them


@dataclass(frozen=True)
class Lengths:
    """Tokens of the answers: lognormal, cut at `longest`. deviation: of the logarithm; 0: all have the mean.

    The mean is of the distribution before the cut.
    """

    mean: float
    longest: int
    deviation: float = 0.7

    def sample(self, count: int, seed: int) -> np.ndarray:
        """[count] float64, at least 1."""
        normal = np.random.default_rng(seed).standard_normal(count)
        values = self.mean * np.exp(self.deviation * normal - self.deviation**2 / 2)
        return np.clip(np.round(values), 1, self.longest)


@dataclass(frozen=True)
class Server:
    """One server: bytes of weights and KV cache by GPU, sequences at once, seconds of a decoding step and of a prompt.

    weights: of a GPU.  cache: of a GPU, what is left for KV.  cache_tokens: that fit.  sequences: that run at once.
    """

    gpus: int
    weights: float
    cache: float
    cache_tokens: int
    sequences: int
    step_s: Callable[[float, float], float]
    prefill_s: Callable[[float], float]

    @property
    def fits(self) -> bool:
        return self.sequences >= 1


def server(
    model: ModelDescription,
    gpu: GPU,
    *,
    tp: int,
    machines: int = 1,
    weight_bytes: float,
    cache_bytes: float,
    tokens_each: float,
    longest: int,
    most: int,
    most_tokens: int | None = None,
    static: float = EFFICIENCY.static,
    efficiency: Efficiency = EFFICIENCY,
) -> Server:
    """A server of `tp` GPUs on so many machines.

    weight_bytes, cache_bytes: of a parameter, of an element of KV.
    tokens_each: of a running sequence on average, prompt and answer.  longest: of one, at most.
    most:        sequences that it may run at once.  most_tokens: in its cache; None: what fits.
    static:      mem_fraction_static.
    """
    ends = model.vocab_size * model.hidden * (1 if model.tied_embeddings else 2)
    experts = len(model.moe_layers) * model.num_experts * expert(model)
    dense = total(model) - ends - experts
    chooser, chooser_cache = indexer(model)
    choosers = 2.0 * model.num_layers * chooser  # bfloat16, whatever the others are, and whole on each GPU
    weights = weight_bytes * total(model) / tp + choosers
    pool = static * gpu.memory
    attends = model.num_layers - len(model.delta_layers)
    per_token = attends * (kv_cache(model, tp) * cache_bytes + chooser_cache)
    states, before = delta_state(model, tp)
    state = 4.0 * states + 2.0 * before
    cache = pool - weights
    # states of gated delta nets have room for the sequences that the rest of the cache can hold
    held = min(most, max(1, int(cache / (tokens_each * per_token + state)))) if state else 0
    cache_tokens = max(0, int((cache - held * state) / per_token))
    usable = cache_tokens if most_tokens is None else min(cache_tokens, most_tokens)
    sequences = 0 if usable < longest else min(most, int(usable / tokens_each))
    head = model.vocab_size * model.hidden
    peak = gpu.bf16

    of_experts = len(model.moe_layers) * expert(model)
    each, square = flops.forward(model, 1.0, 0.0), flops.forward(model, 0.0, 1.0)

    def step_s(batch: float, context: float) -> float:
        met = model.num_experts * (1 - (1 - model.topk / model.num_experts) ** batch) if model.moe_layers else 0.0
        read = weight_bytes * (head + dense + met * of_experts) / tp + choosers
        read += batch * (context * per_token + 2 * state)
        work = batch * (each + 2 * context * square) / tp
        busy = max(read / (gpu.bandwidth * efficiency.decode), work / (peak * efficiency.prefill))
        return busy + model.num_layers * efficiency.launch_s + between_s(batch)

    def prefill_s(prompt: float) -> float:
        return (each * prompt + square * prompt**2) / (tp * peak * efficiency.prefill) + between_s(prompt)

    def between_s(tokens: float) -> float:
        if machines == 1:
            return 0.0
        moved = 2 * (machines - 1) / machines * tokens * model.hidden * weight_bytes / (tp / machines)
        return 2 * model.num_layers * (efficiency.hop_s + moved / (gpu.network * efficiency.network))

    return Server(tp, weights, cache, cache_tokens, sequences, step_s, prefill_s)


@dataclass(frozen=True)
class Generation:
    """Of one server. seconds: until its last answer. busy: share of its places that held a sequence, on average."""

    seconds: float
    busy: float
    answers: int


def generate(
    lengths: Sequence[float] | np.ndarray, places: int, step_s: Callable[[float, float], float], prompt: float
) -> Generation:
    """Answers of these lengths on one server, in this order, `places` at once; a place that is free takes the next.

    step_s: seconds of a step by (sequences, mean context). Between two ends of answers nothing changes but the
    context, which grows by one a step: the step in the middle stands for them all.
    """
    waiting = iter(lengths)
    running: list[tuple[float, float]] = []  # (step of its end, step of its start)
    step = seconds = held = starts = 0.0

    def admit() -> None:
        nonlocal starts
        while len(running) < places:
            length = next(waiting, None)
            if length is None:
                return
            heapq.heappush(running, (step + float(length), step))
            starts += step

    admit()
    while running:
        end = running[0][0]
        batch = len(running)
        context = prompt + (step + end) / 2 - starts / batch
        passed = (end - step) * step_s(batch, context)
        seconds, held, step = seconds + passed, held + passed * batch, end
        while running and running[0][0] <= step:
            starts -= heapq.heappop(running)[1]
        admit()
    most = min(places, len(lengths))
    return Generation(seconds, held / (seconds * most) if seconds else 0.0, len(lengths))


@dataclass(frozen=True)
class Sampling:
    """Seconds of the answers of a step on all servers.

    rollout: until the last is done.  busy: share of the places that the servers began with that held a sequence, on
    average over `rollout`.
    steady: of as many tokens while the places stay full, of which there are no more than the answers of 1 + `ahead`
    steps fill.  full: without that limit.
    """

    rollout: float
    busy: float
    steady: float
    full: float


def sample(answers: np.ndarray, servers: int, one: Server, prompt: float, *, ahead: int = 0) -> Sampling:
    """answers: [N] tokens, dealt to the servers in turn.

    Where there are many servers, those with the longest answers are followed, which set the end, and as many of the
    others, which stand for all.
    """
    shares = [answers[i::servers] for i in range(min(servers, len(answers)))]
    shares.sort(key=lambda share: (-share.max(), -share.sum()))
    half = _SERVERS // 2
    longest, others = shares[:half], shares[half :: max(1, len(shares) // half)]
    ends = [generate(share, one.sequences, one.step_s, prompt) for share in longest]
    rest = [generate(share, one.sequences, one.step_s, prompt) for share in others] or ends
    decode = max(run.seconds for run in (*ends, *rest))
    prefill = len(answers) / servers * one.prefill_s(prompt)
    used = np.mean([run.busy * run.seconds * min(one.sequences, run.answers) for run in rest])
    places = min(one.sequences, len(shares[0]))
    busy = float(used) * len(shares) / servers / (decode * places)
    context = prompt + float((answers**2).sum() / answers.sum()) / 2

    def at(batch: float) -> float:
        return float(answers.sum()) / servers / batch * one.step_s(batch, context) + prefill

    most = min(float(one.sequences), (1 + ahead) * len(answers) / servers)
    rollout = decode + prefill
    return Sampling(rollout, (busy * decode + prefill) / rollout, at(most), at(float(one.sequences)))
