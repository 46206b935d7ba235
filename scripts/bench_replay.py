"""What replay costs: a trainer step and a rollout at 2,048 tokens a sequence, with and without routes, turn about.

    .venv/bin/python scripts/bench_replay.py [--tokens 2048] [--sequences 8] [--turns 9] [--rollout-turns 3]
    .venv/bin/python scripts/bench_replay.py --router    # one router's choice alone: native, replayed, with a floor

The trainer is one rank on the quickstart's model (4 layers, 8 experts, top 2). Rollouts come from two real servers, one
that captures and returns routes and one that does not, asked in turn. Prints medians, the median over the turns of the
ratio, and the bytes of routes a token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.config.model import TinyModelConfig
from pipeline.config.server import ServerConfig
from pipeline.data.tiny_model import make_tiny_model
from pipeline.engine.client import SGLangClient
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.types import Prompt

SHAPE = TinyModelConfig()  # pyright: ignore[reportCallIssue]


def compare(name: str, runs: dict[str, Callable[[], object]], turns: int) -> None:
    """Time the runs turn about, after one turn that warms up."""
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(turns + 1):
        order = list(runs) if turn % 2 else list(runs)[::-1]
        for key in order:
            start = time.perf_counter()
            runs[key]()
            if turn:
                seconds[key].append(time.perf_counter() - start)
    plain, routed = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(plain, routed, strict=True))
    shown = ", ".join(f"{key} {statistics.median(s):.3f} s" for key, s in seconds.items())
    print(f"{name:14}{shown}, ratio {ratio:.3f}", flush=True)


def trainer_step(model: Path, sequences: int, tokens: int, turns: int) -> None:
    """One update of GSPO on full sequences; the routes are random, as costly as any."""
    from megatron_ext import parallel
    from megatron_ext.trainer import Trainer
    from pipeline.trainer.losses import ON_POLICY, LossRow, policy_loss

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    config = ParallelConfig()  # pyright: ignore[reportCallIssue]
    settings = TrainerConfig(micro_batch_tokens=tokens)  # pyright: ignore[reportCallIssue]
    with tempfile.TemporaryDirectory() as folder:
        parallel.initialize(config, rank=0, init_method=f"file://{folder}/meeting")
        trainers = {
            name: Trainer(model, config, settings, OptimizerConfig(lr=1e-5), replay=name == "replayed")  # pyright: ignore[reportCallIssue]
            for name in ("native", "replayed")
        }
        samples = []
        for _ in range(sequences):
            routes = rng.random((tokens - 1, SHAPE.layers, SHAPE.experts)).argsort(-1)[..., : SHAPE.topk]
            row = LossRow(np.full(tokens - 16, -4, np.float32), ON_POLICY, float(rng.normal()))
            samples.append(Sample(rng.integers(3, 60, tokens).astype(np.int32), 16, row, routes.astype(np.uint8)))
        objective = resolve(ObjectiveConfig(preset="gspo"))
        loss = policy_loss(objective, Denominators(sequences, sequences * (tokens - 16), tokens))
        plain = [replace(s, routes=None) for s in samples]
        compare(
            "trainer step",
            {
                "native": lambda: trainers["native"].update(plain, loss),
                "replayed": lambda: trainers["replayed"].update(samples, loss),
            },
            turns,
        )
        parallel.shutdown()
    assert samples[0].routes is not None
    size = samples[0].routes.nbytes / (tokens - 1)
    print(f"routes: {size:.0f} bytes a token ({SHAPE.layers} layers x top {SHAPE.topk})")


def router(tokens: int, turns: int, experts: int = 128, topk: int = 8) -> None:
    """One router of Qwen3-30B-A3B's shape: milliseconds in which it chooses the experts of `tokens` tokens."""
    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, experts, generator=generator)
    given = (scores + 0.02 * torch.randn(tokens, experts, generator=generator)).topk(topk).indices
    counted = torch.ones(tokens, dtype=torch.bool)
    spent: dict[str, list[float]] = {"native": [], "replayed": [], "with a floor": []}
    for _ in range(turns + 1):
        for name, seconds in spent.items():
            replay = LayerReplay(0.5 if name == "with a floor" else None, of_logits=True)
            if name != "native":
                replay.target_topk_idx, replay.counted = given, counted
                replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            start = time.perf_counter()
            replay.get_replay_topk(scores, topk, default_compute_topk=lambda s, k, *_, **__: torch.topk(s, k))
            seconds.append(time.perf_counter() - start)
    shown = ", ".join(f"{name} {1e3 * statistics.median(s[1:]):.1f} ms" for name, s in spent.items())
    print(f"router, {tokens} tokens, top {topk} of {experts}: {shown}")


def rollout(model: Path, sequences: int, tokens: int, turns: int) -> None:
    """The same prompts to a server without and to one with routes."""
    prompts = [Prompt(np.arange(3, 19), "") for _ in range(sequences)]
    sampling = Sampling(max_new_tokens=tokens - 16, temperature=1.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        servers, clients = [], {}
        try:
            for name in ("without", "with routes"):
                server = SGLangServer(
                    ServerConfig(context_length=tokens + 8),  # pyright: ignore[reportCallIssue]
                    model,
                    Path(folder) / f"{name}.log",
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    seed=0,
                    return_routed_experts=name != "without",
                )
                servers.append(server)
                server.start()
                server.wait_ready()
                clients[name] = SGLangClient(
                    server.url,
                    keys=server.keys,
                    vocab_size=64,
                    num_layers=SHAPE.layers,
                    topk=SHAPE.topk,
                    num_experts=SHAPE.experts,
                    routes=name != "without",
                )
            compare(
                "rollout",
                {
                    name: lambda c=client: sample_groups_sync(c, prompts, 1, sampling)
                    for name, client in clients.items()
                },
                turns,
            )
        finally:
            for server in servers:
                server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence, 16 of them its prompt")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rollout-turns", type=int, default=3)
    parser.add_argument("--router", action="store_true", help="the choice of one router alone")
    options = parser.parse_args()
    if options.router:
        router(options.tokens, options.turns)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", SHAPE, 0)
        trainer_step(model, options.sequences, options.tokens, options.turns)
        rollout(model, options.sequences, options.tokens, options.rollout_turns)


if __name__ == "__main__":
    main()
