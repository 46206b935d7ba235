"""The plan of a configuration that runs without a GPU: what a trainer rank holds, and what a step moves.

There is no card to fit into, and nobody has measured a CPU's efficiency for `plan`, so there are no seconds and no
verdict. `sameroute plan CONFIG --gpu h100` says what the same configuration would do on GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from megatron_ext.hf.description import ModelDescription
from pipeline.config import Config
from pipeline.plan.counts.parameters import active, total
from pipeline.plan.hardware import EFFICIENCY
from pipeline.plan.memory import Memory, item_bytes
from pipeline.plan.plan import SEED, Work, expected_lengths, step_work, trainer_memory
from pipeline.plan.show import GB, layout_of, table

NO_GPU = "device: cpu, so there is no GPU to fit into, and no seconds; see --gpu"


@dataclass(frozen=True)
class CPUPlan:
    """memory: of the rank that holds most. mean: tokens of an answer, assumed. weight_bytes: sent once a step."""

    config: Config
    model: ModelDescription
    memory: Memory
    work: Work
    mean: float
    weight_bytes: float


def make_cpu_plan(config: Config, model: ModelDescription, mean_response: float | None = None) -> CPUPlan:
    """mean_response: tokens of an answer; None: a third of the longest."""
    lengths = expected_lengths(config, mean_response)
    answers = lengths.sample(config.rollout.prompts_per_step * config.rollout.samples_per_prompt, SEED)
    work = step_work(config, model, config.data.max_prompt_tokens / 2 + answers)
    no_card = dataclasses.replace(EFFICIENCY, reserve=0.0)
    return CPUPlan(
        config=config,
        model=model,
        memory=trainer_memory(config, model, work.micro_batches, no_card),
        work=work,
        mean=lengths.mean,
        weight_bytes=float(item_bytes(config.precision)) * total(model),
    )


def cpu_plan_as_json(plan: CPUPlan) -> dict[str, Any]:
    """Bytes and counts by the names of show.as_json. `gpu` is null, and there is no `fits`."""
    m = plan.memory
    return {
        "gpu": None,
        "note": NO_GPU,
        "trainer_ranks": plan.config.parallel.ranks,
        "parameters": {"total": total(plan.model), "active": active(plan.model)},
        "trainer_bytes": {
            **m.by_name(),
            "stage": m.stage,
        },
        "step": {
            "tokens": plan.work.tokens,
            "flops": plan.work.logprobs + plan.work.update,
            "micro_batches": plan.work.micro_batches,
            "weight_transfer_bytes": plan.weight_bytes,
        },
    }


def print_cpu_plan(plan: CPUPlan, console: Console | None = None) -> None:
    """Tables on standard output, or on `console`."""
    config, m, console = plan.config, plan.memory, console or Console()
    console.print(f"{NO_GPU}.", highlight=False)
    console.print(
        f"[bold]{plan.model.model_type}[/]: {total(plan.model):,} parameters, {active(plan.model):,} active; "
        f"trainer {layout_of(config)}"
    )
    rows = [
        ("weights", _mib(m.weights), config.precision.weights),
        ("gradients", _mib(m.gradients), "float32"),
        ("optimizer", _mib(m.optimizer), "float32"),
        ("reference, teacher, critic", _mib(m.others), ""),
        ("activations", _mib(m.activations), f"recompute {config.trainer.recompute}"),
        ("LM head", _mib(m.head), "no logits are kept"),
        ("fragments", _mib(m.overhead), "assumed"),
        ("[bold]total[/]", f"[bold]{_mib(m.total)}[/]", "Python and the libraries come on top"),
    ]
    console.print(table(f"Memory of a trainer rank, MiB (stage {m.stage}, which holds most)", rows))
    work = plan.work
    rows = [
        ("FLOPs of the trainer", f"{work.logprobs + work.update:.2e}", f"{work.model:.2e} without recomputation"),
        ("micro-batches a rank", f"{work.micro_batches}", ""),
        ("weights sent", f"{plan.weight_bytes / GB:.3f} GB", "once a step"),
    ]
    console.print(table(f"A step: {work.tokens:,.0f} tokens, answers of {plan.mean:,.0f} on average (assumed)", rows))


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f}"
