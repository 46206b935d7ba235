"""Processor time and memory of what stands around the matrices, against the size of a step, a model and a layout.

    .venv/bin/python scripts/bench_scaling.py [--parts packing loss ...] [--axes length sequences ...]

Each part runs alone in a process of its own, once with each size of an axis, the other sizes as BASE has them. A part
with one axis takes less than three minutes:

    micro-batches  sequences dealt into micro-batches of 16,384 tokens, of 8 data-parallel ranks but for the axis
    packing        all of them as one micro-batch; replay: with their routes
    router         one router that replays, of 4,096 tokens
    log-probs      the LM head, forward and backward, 4,096 words but for the axis
    loss           GSPO, forward and backward
    dump           a step written and read, with routes
    report         of 4 steps with all their rollouts
    road           answers of all sequences asked of simulated servers, decoded, checked and made the trainer's samples
    merge          what the ranks say of an update's tokens made one
    shares         which of 8 senders sends which weights
    checkpoint     a trainer of one rank, after a step, written; resume: read
    plan           where Qwen3-30B-A3B's gates and ups, of 12 times the layers, are written and read, without data

Seconds are processor time, the least of some turns, so other work on the machine counts little. Memory is what the
process held at most beside what it held before. The exponent is the slope of log seconds over log size in the upper
half of the sizes: 1 grows as the work does where the size is the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOPK, VOCAB, GROUP = 2, 512, 8
BASE = {"length": 1024, "sequences": 64, "layers": 4, "experts": 8, "ranks": 8, "servers": 1, "vocabulary": 4096}
SMALL = BASE | {"length": 64, "sequences": GROUP, "layers": 2}
AXES = {
    "length": (256, 1024, 4096, 16384),
    "sequences": (8, 32, 128, 512, 1024),
    "layers": (4, 16, 64),
    "experts": (8, 32, 128, 256),
    "ranks": (8, 32, 128, 512),
    "servers": (1, 4, 16, 64),
    "vocabulary": (4096, 16384, 65536, 262144),
}
Part = Callable[[dict[str, int], Path], Iterator[Callable[[], object]]]


def import_all() -> None:
    """Once, before processes are forked."""
    for module in ("megatron_ext.trainer", "pipeline.loop.run", "pipeline.observe.report.page"):
        importlib.import_module(module)


def description(sizes: dict[str, int]):
    from megatron_ext.hf.description import describe

    return describe(
        {
            "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128,
            "moe_intermediate_size": 64, "num_hidden_layers": sizes["layers"], "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "num_experts": sizes["experts"], "num_experts_per_tok": TOPK,
            "norm_topk_prob": True, "max_position_embeddings": 32768, "tie_word_embeddings": False,
            "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    )  # fmt: skip


def routes(sizes: dict[str, int]) -> np.ndarray:
    """[length - 1, layers, topk] uint8, no expert twice."""
    first = np.random.default_rng(0).integers(0, sizes["experts"], (sizes["length"] - 1, sizes["layers"]))
    return np.stack([first, (first + 1) % sizes["experts"]], -1).astype(np.uint8)


def samples(sizes: dict[str, int], *, routed: bool) -> list:
    from megatron_ext.batch.layout import Sample

    tokens = np.random.default_rng(0).integers(3, VOCAB, sizes["length"]).astype(np.int32)
    return [Sample(tokens, 16, {}, routes(sizes) if routed else None) for _ in range(sizes["sequences"])]


def groups(sizes: dict[str, int], *, routed: bool) -> tuple:
    from pipeline.types import Episode, Group, Prompt, Rollout

    count = sizes["length"] - 1
    one = Rollout(
        prompt_ids=np.full(1, 3, np.int32),
        response_ids=np.random.default_rng(0).integers(3, 60, count).astype(np.int32),
        rollout_logprobs=np.full(count, -1, np.float32),
        routes=routes(sizes) if routed else None,
        weight_versions=np.full(count, 1, np.int32),
        finish_reason="stop",
    )
    return tuple(
        Group(Prompt(np.full(1, 3, np.int32), "a", {}, n), tuple(Episode((one,), float(i % 2)) for i in range(GROUP)))
        for n in range(sizes["sequences"] // GROUP)
    )


def micro_batches(sizes: dict[str, int], _: Path):
    from megatron_ext.batch.layout import plan_micro_batches

    lengths = np.random.default_rng(0).integers(16, sizes["length"], sizes["sequences"]).tolist()
    yield lambda: plan_micro_batches(lengths, token_budget=16384, dp_size=sizes["ranks"])


def packing(sizes: dict[str, int], _: Path, *, routed: bool = False):
    from megatron_ext.batch.layout import TokenLayout
    from megatron_ext.batch.micro_batch import make_micro_batch

    made, model = samples(sizes, routed=routed), description(sizes) if routed else None
    layout = TokenLayout(tuple(s.input_length for s in made))
    yield lambda: make_micro_batch(range(len(made)), made, replace(layout), torch.device("cpu"), model)


def router(sizes: dict[str, int], _: Path):
    from megatron_ext.batch.replay import LayerReplay
    from megatron_ext.mcore import RouterReplayAction

    scores = torch.randn(4096, sizes["experts"])
    own, given = LayerReplay(None, of_logits=True), scores.topk(TOPK).indices

    def choose():
        own.target_topk_idx, own.counted = given, torch.ones(len(scores), dtype=torch.bool)
        own.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        own.get_replay_topk(scores, TOPK, default_compute_topk=lambda s, k, *_, **__: torch.topk(s, k))

    yield choose


def log_probs(sizes: dict[str, int], _: Path):
    from megatron_ext.logprobs.linear import linear_logprobs

    hidden = torch.randn(sizes["length"], 128, requires_grad=True)
    weight = torch.randn(words := sizes["vocabulary"], 128, requires_grad=True)
    labels = torch.randint(words, (sizes["length"],))
    yield lambda: linear_logprobs(hidden, weight, labels, vocab_size=words)[0].sum().backward()


def loss(sizes: dict[str, int], _: Path):
    from megatron_ext.trainer import LossBatch
    from pipeline.objectives import Denominators, ObjectiveConfig, resolve
    from pipeline.trainer.losses import ON_POLICY, LossRow, policy_loss

    count, tokens = sizes["sequences"], sizes["length"]
    rows = tuple(LossRow(np.full(tokens, -1, np.float32), ON_POLICY, float(n % 2)) for n in range(count))
    of = policy_loss(resolve(ObjectiveConfig(preset="gspo")), Denominators(count, count * tokens, tokens))
    current = torch.full((count, tokens), -1.0, requires_grad=True)
    entropy = torch.zeros(count, tokens)
    mask = torch.ones(count, tokens, dtype=torch.bool)
    yield lambda: of(LossBatch((current, entropy), mask, rows, tuple(range(count))))[0].backward()


def dump(sizes: dict[str, int], folder: Path):
    from pipeline.dumps.dump import Dump, read_dump, write_dump
    from pipeline.step import Batch

    whole = Dump(Batch(1, 1, groups(sizes, routed=True)), 1.0)
    yield lambda: read_dump(write_dump(folder, whole))


def report(sizes: dict[str, int], folder: Path):
    from pipeline.config import load_config
    from pipeline.data.tokenizer import load_tokenizer, write_character_tokenizer
    from pipeline.objectives import ObjectiveConfig, resolve
    from pipeline.observe.report.page import write_report
    from pipeline.observe.run_dir import RunDirectory
    from pipeline.step import Batch, PolicyTokens, StepResult

    config = load_config("configs/quickstart.yaml", ["train.steps=4"]).model_dump(mode="json")
    directory, made = RunDirectory(folder / "run", config), groups(sizes, routed=False)
    tokenizer = load_tokenizer(write_character_tokenizer(folder / "tokenizer"))
    rows = [rollout.rollout_logprobs for group in made for e in group.episodes for rollout in e.rollouts]

    def record():
        for step in range(1, 5):
            tokens = PolicyTokens(rows, rows, np.tile([100, 100, 0, 0], (4, 1)))
            result = StepResult({"step": step}, Batch(step, 1, made), tokens, rows, [1.0] * len(rows))
            directory.record({"step": step, "reward/mean": 0.5})
            directory.write_step(result, resolve(ObjectiveConfig(preset="gspo")), tokenizer)

    record()
    yield lambda: write_report(directory.path)


def road(sizes: dict[str, int], _: Path):
    from bench_road import Simulated, client_of
    from simulated_servers import Shape, simulated_servers

    from pipeline.engine.client import SGLangClient
    from pipeline.engine.fleet import Fleet, FleetServer
    from pipeline.engine.sampling import Sampling
    from pipeline.rollout.sampler import sample_groups_sync
    from pipeline.trainer.group import to_sample
    from pipeline.types import Prompt

    shape = Shape(sizes["layers"], TOPK, sizes["experts"], VOCAB)
    prompts = [Prompt(np.full(1, 3, np.int32), "a", {}, n) for n in range(sizes["sequences"] // GROUP)]
    sampling = Sampling(max_new_tokens=sizes["length"] - 1, temperature=1.0, ignore_eos=True)
    with simulated_servers(sizes["servers"], shape) as urls:
        clients = [client_of(url, shape, SGLangClient) for url in urls]
        fleet = Fleet([FleetServer(Simulated(c.url), c) for c in clients])  # pyright: ignore[reportArgumentType]
        fleet.wait_ready()
        fleet.transfer(Simulated(""))  # pyright: ignore[reportArgumentType]
        yield lambda: [
            to_sample(r) for group in sample_groups_sync(fleet, prompts, GROUP, sampling) for r in group.rollouts
        ]


def merge(sizes: dict[str, int], _: Path):
    from megatron_ext.parts import TokenPart, UpdatePart, merge_routing, merge_tokens, merge_update

    ranks, count = sizes["ranks"], sizes["sequences"]
    one = np.full(sizes["length"] - 1, -1, np.float32)
    counts: dict[int, tuple[int, ...]] = dict.fromkeys(range(sizes["layers"]), (1, 1, 0, 0))
    parts = [
        UpdatePart({"loss/objective": (1.0, 1.0, "sum")}, 1.0, 1.0, False, TokenPart((own, own), counts))
        for own in (dict.fromkeys(range(rank, count, ranks), one) for rank in range(ranks))
    ]
    seen = [part.seen for part in parts]
    yield lambda: (merge_update(parts), merge_tokens(seen, count), merge_routing(seen))


def shares(sizes: dict[str, int], _: Path):
    from megatron_ext.hf.senders.assignment import Place, Unit, assign, choose_senders

    stages, expert = 2, 4
    places = [Place(r, r * stages // sizes["ranks"], r % expert) for r in range(sizes["ranks"])]
    units = [
        Unit(stage, (n,), 100 + n, e % expert)
        for stage in range(stages)
        for n in range(sizes["layers"] * 3)
        for e in range(sizes["experts"])
    ]
    yield lambda: assign(units, places, choose_senders(places, 8))


def checkpoint(sizes: dict[str, int], folder: Path, *, read: bool = False):
    from megatron_ext import parallel
    from megatron_ext.batch.layout import Sample
    from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
    from megatron_ext.trainer import Trainer
    from pipeline.config.model import TinyModelConfig
    from pipeline.data.tiny_model import make_tiny_model

    shape = TinyModelConfig(layers=sizes["layers"], experts=sizes["experts"])  # pyright: ignore[reportCallIssue]
    model = make_tiny_model(folder / "model", shape, 0)
    config = ParallelConfig()  # pyright: ignore[reportCallIssue]
    parallel.initialize(config, rank=0, init_method=f"file://{folder}/meeting")
    trainer = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=True)  # pyright: ignore[reportCallIssue]
    # Adam has moments after a step
    trainer.policy.step([Sample(np.arange(3, 40, dtype=np.int32), 1)], lambda _, q: (q[0].sum(), {}), "native")

    def save() -> Path:
        target = Path(tempfile.mkdtemp(dir=folder))
        saved = trainer.begin_save(target)
        saved.written(wait=True)
        saved.describe([saved.part()])
        return target

    yield partial(trainer.resume, save()) if read else save
    parallel.shutdown()


def plan(sizes: dict[str, int], folder: Path):
    from megatron_ext import parallel
    from megatron_ext.checkpoint.planners import LoadPlanner, SavePlanner, torch_state
    from megatron_ext.config import ParallelConfig
    from megatron_ext.mcore import ShardedTensor

    parallel.initialize(ParallelConfig(), rank=0, init_method=f"file://{folder}/meeting")  # pyright: ignore[reportCallIssue]
    half, shape = torch.empty(768, 2048, device="meta"), (12 * sizes["layers"], sizes["experts"], 2)
    places = [tuple(zip(range(3), at, shape, strict=True)) for at in np.ndindex(shape)]

    def state() -> dict:
        return torch_state(
            {"fc1": [ShardedTensor.from_rank_offsets("fc1", half, *p, prepend_axis_num=2) for p in places]}
        )

    def save_and_load():
        saving, loading = SavePlanner(), LoadPlanner([])
        saving.set_up_planner(state(), is_coordinator=True)
        loading.metadata = saving.create_global_plan([saving.create_local_plan()])[1]
        loading.state_dict = state()
        loading.create_local_plan()

    yield save_and_load
    parallel.shutdown()


replay, resume = partial(packing, routed=True), partial(checkpoint, read=True)
MEETING = (checkpoint, resume, plan)  # joining a group of ranks, once in a process
PARTS: dict[str, tuple[Part, tuple[str, ...]]] = {
    "micro-batches": (micro_batches, ("sequences", "ranks")),
    "packing": (packing, ("length", "sequences")),
    "replay": (replay, ("length", "sequences", "layers", "experts")),
    "router": (router, ("experts",)),
    "log-probs": (log_probs, ("length", "vocabulary")),
    "loss": (loss, ("length", "sequences")),
    "dump": (dump, ("length", "sequences", "layers")),
    "report": (report, ("length", "sequences")),
    "road": (road, ("length", "sequences", "servers")),
    "merge": (merge, ("sequences", "ranks")),
    "shares": (shares, ("layers", "experts", "ranks")),
    "checkpoint": (checkpoint, ("layers", "experts")),
    "resume": (resume, ("layers", "experts")),
    "plan": (plan, ("layers", "experts")),
}


def status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(part: Part, sizes: dict[str, int]) -> tuple[float, float]:
    """(processor seconds, bytes at most beside those before)."""
    torch.set_num_threads(1)
    if part not in MEETING:  # what a first call makes for good is not the part's
        with tempfile.TemporaryDirectory() as folder:
            for run in part(SMALL, Path(folder)):
                run()
    with tempfile.TemporaryDirectory() as folder:
        for run in part(sizes, Path(folder)):
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            turns: list[float] = []
            while len(turns) < 2 or (sum(turns) < 0.3 and len(turns) < 20):
                began = time.process_time()
                run()
                turns.append(time.process_time() - began)
            return min(turns), max(0, status("VmHWM") - before)
    raise AssertionError("a part has something to run")


def in_child(part: Part, sizes: dict[str, int]) -> tuple[float, float]:
    """`measured` in a process of its own, forked from this one."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(theirs, json.dumps(measured(part, sizes)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        text = answer.read()
    if os.waitpid(child, 0)[1] or not text:
        raise RuntimeError(f"nothing came of {sizes}")
    seconds, nbytes = json.loads(text)
    return seconds, nbytes


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log size in the upper half, at least two sizes; no value is below 10 us or bytes."""
    keep = max(2, (len(sizes) + 1) // 2)
    x = [math.log(s) for s in sizes[-keep:]]
    y = [math.log(max(v, 1e-5)) for v in values[-keep:]]
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import_all()
    print("| part | axis | sizes | processor ms | exponent | memory, MB | exponent |\n|---|---|---|---|---|---|---|")
    for name in options.parts:
        part, axes = PARTS[name]
        for axis in (a for a in axes if a in options.axes):
            found: list[tuple[float, Any]] = [in_child(part, BASE | {axis: size}) for size in AXES[axis]]
            seconds, nbytes = [s for s, _ in found], [float(b) for _, b in found]
            sizes = ", ".join(f"{s:,}" for s in AXES[axis])
            times, memory = (", ".join(f"{v:.3g}" for v in each) for each in ([1e3 * s for s in seconds],
                                                                              [b / 1e6 for b in nbytes]))  # fmt: skip
            of_memory = f"{exponent(AXES[axis], nbytes):.2f}" if nbytes[-1] > 4e6 else ""
            row = [name, axis, sizes, times, f"{exponent(AXES[axis], seconds):.2f}", memory, of_memory]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
