"""A plan as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config
from pipeline.config.server import nodes_of_server
from pipeline.plan.hardware import GIB
from pipeline.plan.layouts import Proposal
from pipeline.plan.longest import LONG
from pipeline.plan.plan import Plan

GB, MB = 1e9, 1e6
Row = tuple[str, str, str]


def print_json(plan: Plan, proposal: Proposal | None) -> None:
    """One JSON object on standard output."""
    print(json.dumps(as_json(plan, proposal), indent=2))


def layout_of(config: Config) -> str:
    """One line."""
    p = config.parallel
    sizes = {
        "tensor": p.tensor, "pipeline": p.pipeline, "chunks": p.virtual_pipeline or 1, "context": p.context,
        "expert": p.expert, "data": p.data,
    }  # fmt: skip
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{p.ranks} {'rank' if p.ranks == 1 else 'ranks'}" + (f": {split}" if split else "")


def as_json(plan: Plan, proposal: Proposal | None) -> dict[str, Any]:
    """Bytes, seconds, counts and shares by name."""
    m, s = plan.memory, plan.seconds
    out: dict[str, Any] = {
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "gpu": plan.gpu.name,
        "nodes": plan.config.cluster.nodes,
        "trainer_ranks": plan.config.parallel.ranks,
        "servers": plan.servers,
        "parameters": {"total": plan.total, "active": plan.active, "trained": plan.trained},
        "trainer_bytes": {
            **m.by_name(),
            "capacity": plan.gpu.memory,
            "host": m.host,
            "stage": m.stage,
        },
        "server": {
            "gpus": plan.server.gpus,
            "weight_bytes_a_gpu": plan.server.weights,
            "cache_bytes_a_gpu": max(0.0, plan.server.cache),
            "cache_tokens": plan.server.cache_tokens,
            "sequences": plan.server.sequences,
            "busy": plan.sampling.busy,
        },
        "step": {
            "tokens": plan.work.tokens,
            "flops": plan.flops,
            "micro_batches": plan.work.micro_batches,
            "bubble": plan.bubble,
            "expert_tokens": plan.expert_tokens[0],
            "expert_tokens_deviation": plan.expert_tokens[1],
            "weight_transfer_bytes": plan.weights.nbytes,
            "weight_senders": plan.weights.senders,
            "weight_bytes_by_sender": plan.weights.by_sender,
            "route_bytes": plan.route_bytes,
            "route_wire_bytes": plan.route_wire_bytes,
        },
    }
    long = plan.longest
    out["longest"] = {
        "tokens": long.tokens, "at_once": long.at_once, "asked": long.asked, "route_bytes": long.routes,
        "route_wire_bytes": long.wire, "server_route_table_bytes": long.table,
    }  # fmt: skip
    if plan.server.fits:
        out["seconds"] = {
            "rollout": s.rollout, "logprobs": s.logprobs, "update": s.update, "sync": s.sync, "turns": s.turns,
            "step": s.step,
        }  # fmt: skip
        if s.pace is not None:
            lag = s.pace.lag
            out["asynchronous"] = {
                "trainer_busy": s.pace.trainer,
                "server_places_busy": s.pace.servers,
                "lag": lag,
                "optimizer_steps_behind": [lag * plan.config.train.mini_batches + k for k in (0, _last(plan))],
            }
    if plan.turns is not None:
        out["turns"] = {"host_bytes": plan.turns.host, "moved_bytes": plan.turns.moved}
    if proposal is not None:
        out["proposal"] = {"overrides": list(proposal.overrides), "plan": as_json(proposal.plan, None)}
    return out


def print_plan(plan: Plan, proposal: Proposal | None, console: Console | None = None) -> None:
    """Tables on standard output, or on `console`."""
    config, console = plan.config, console or Console()
    console.print(
        f"[bold]{plan.model.model_type}[/]: {plan.total:,} parameters, {plan.active:,} active{_of_adapters(plan)}; "
        f"{config.cluster.nodes} x {config.cluster.gpus_per_node} {plan.gpu.name}; trainer {layout_of(config)}; "
        f"servers: {plan.servers}, GPUs of each: {plan.server.gpus}{_of_machines(plan)}"
    )
    stage = plan.memory.stage
    console.print(table(f"Memory of a trainer rank, GiB (stage {stage}, which holds most)", _trainer_rows(plan)))
    console.print(table("Memory of a server's GPU, GiB", _server_rows(plan)))
    mean = f"{plan.lengths.mean:,.0f}"
    title = f"A step: {plan.work.tokens:,.0f} tokens, answers of {mean} on average (assumed)"
    console.print(table(title, _step_rows(plan)))
    if plan.server.fits:
        title = "Seconds of a step, from assumed efficiencies (docs/plan.md)"
        console.print(table(title, _seconds_rows(plan)))
    if plan.longest.tokens >= LONG:
        console.print(table(f"The longest sequence, {plan.longest.tokens:,} tokens", _longest_rows(plan)))
    for reason in plan.reasons:
        console.print(f"[bold red]does not fit:[/] {reason}.", highlight=False)
    if proposal is not None:
        console.print("The nearest layout that fits:", layout_of(proposal.plan.config), highlight=False)
        console.print("    " + " ".join(proposal.overrides), highlight=False, soft_wrap=True)
    elif plan.reasons:
        console.print("No layout that was looked at fits, up to 32 times as many nodes.")


def _of_machines(plan: Plan) -> str:
    machines = nodes_of_server(plan.server.gpus, plan.config.cluster.gpus_per_node)
    return f" on {machines} machines" if machines > 1 else ""


def _of_adapters(plan: Plan) -> str:
    return f", {plan.trained:,} of adapters trained" if plan.config.lora is not None else ""


def _trainer_rows(plan: Plan) -> list[Row]:
    m, config = plan.memory, plan.config
    assumed = "assumed" if plan.turns is None else "assumed, with the servers' processes"
    rows = [
        ("weights", gib(m.weights), config.precision.weights),
        ("gradients", gib(m.gradients), "float32"),
        ("optimizer", gib(m.optimizer), f"{gib(m.host)} in the machine's memory" if m.host else "float32"),
        ("reference, teacher, critic", gib(m.others), ""),
        ("activations", gib(m.activations), f"recompute {config.trainer.recompute}"),
        *([("routes to replay", gib(m.routes), "int64")] if m.routes else []),
        ("LM head", gib(m.head), "no logits are kept"),
        ("reserve, fragments", gib(m.overhead), assumed),
        ("[bold]total[/]", f"[bold]{gib(m.total)}[/]", f"of {gib(plan.gpu.memory)}"),
    ]
    if plan.turns is not None:
        rows.append(("in the servers' turn", gib(plan.turns.host), "goes to the machine's memory"))
    return rows


def _server_rows(plan: Plan) -> list[Row]:
    one, most = plan.server, plan.config.server.max_running_requests
    return [
        ("weights", gib(one.weights), ""),
        ("KV cache", gib(max(0.0, one.cache)), f"{one.cache_tokens:,} tokens a server"),
        ("sequences at once", f"{one.sequences:,}", f"server.max_running_requests {most}"),
    ]


def _step_rows(plan: Plan) -> list[Row]:
    (tokens, deviation), sent = plan.expert_tokens, plan.weights
    return [
        ("FLOPs of the trainer", f"{plan.flops:.2e}", f"{plan.work.model:.2e} without recomputation"),
        ("micro-batches a rank", f"{plan.work.micro_batches}", f"pipeline bubble {plan.bubble:.1%}"),
        ("tokens an expert", f"{tokens:,.0f}", f"± {deviation:,.0f} if drawn at random"),
        ("weights sent", f"{sent.nbytes / GB:.1f} GB", f"once a step, at most {sent.by_sender / GB:.1f} by a rank"),
        ("routes", f"{plan.route_bytes / GB:.2f} GB", f"{plan.route_wire_bytes / GB:.2f} GB in the answers"),
    ]


def _longest_rows(plan: Plan) -> list[Row]:
    one = plan.longest
    rows = [("at once", f"{one.at_once:,}", f"fill a server's cache; it is asked for {one.asked:,.0f}")]
    if plan.server.fits:
        rows.append(("seconds of its answer", f"{one.seconds:,.0f}", "at least: token by token, alone on a server"))
    if one.routes:
        rows.append(("its routes", f"{one.routes / MB:,.1f} MB", f"{one.wire / MB:,.1f} MB in its answer"))
        rows.append(("routes of the cache", f"{one.table / GB:.2f} GB", "of the machine's memory, a rank of a server"))
    return rows


def _seconds_rows(plan: Plan) -> list[Row]:
    s = plan.seconds
    rows = [
        ("rollout", f"{s.rollout:.1f}", f"places of a server busy {plan.sampling.busy:.0%} of it"),
        ("log-probs", f"{s.logprobs:.1f}", ""),
        ("update", f"{s.update:.1f}", ""),
        ("sync", f"{s.sync:.1f}", ""),
    ]
    if (turns := plan.turns) is not None:
        rows.append(("turns", f"{s.turns:.1f}", f"{turns.moved / GB:.0f} GB a rank over PCIe, there and back"))
    if s.pace is None:
        return [*rows, ("[bold]step[/]", f"[bold]{s.step:.1f}[/]", "one phase after the other")]
    busy = f"trainer busy {s.pace.trainer:.0%}, places of the servers {s.pace.servers:.0%}"
    first = s.pace.lag * plan.config.train.mini_batches
    rollout = plan.config.rollout
    return [
        *rows,
        ("[bold]step[/]", f"[bold]{s.step:.1f}[/]", f"rollouts beside the training: {busy}"),
        ("versions behind", f"{s.pace.lag:.1f}", f"on average, {rollout.max_staleness} at most"),
        ("optimizer steps behind", f"{first:.0f} to {first + _last(plan):.0f}", "on average: lag x mini-batches + k"),
    ]


def _last(plan: Plan) -> int:
    """The last optimizer step of a step, from 0."""
    return plan.config.train.mini_batches - 1


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / GIB:.1f}"


def table(title: str, rows: list[Row]) -> Table:
    """Label, number, remark."""
    out = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    out.add_column(min_width=20)
    out.add_column(justify="right", min_width=12)
    out.add_column(style="dim")
    for row in rows:
        out.add_row(*row)
    return out
