"""The plan of a configuration file, with what the command line changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError, load_config_and_model
from pipeline.config.load_config import check_precision
from pipeline.plan.on_cpu import CPUPlan, make_cpu_plan
from pipeline.plan.plan import Plan, make_plan


def plan_of(
    path: Path,
    overrides: Sequence[str],
    gpu: str | None = None,
    nodes: int | None = None,
    mean_response: float | None = None,
) -> Plan | CPUPlan:
    """gpu: None: cluster.gpu, else h100; a CPUPlan where that is None and device is cpu.

    nodes: machines, of whose GPUs the same share trains; None: cluster.nodes.
    mean_response: tokens of an answer, see make_plan. Raises ConfigError.
    """
    config, hf = load_config_and_model(path, [*overrides, *_scaled(path, overrides, nodes)])
    if config.device == "cpu" and gpu is None:
        return make_cpu_plan(config, hf, mean_response)
    if config.device == "auto":  # a plan is of GPUs
        check_precision(config, "cuda")
    try:
        return make_plan(config, hf, gpu or config.cluster.gpu or "h100", mean_response=mean_response)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _scaled(path: Path, overrides: Sequence[str], nodes: int | None) -> list[str]:
    """Overrides for another number of machines."""
    if nodes is None:
        return []
    if nodes < 1:
        raise ConfigError(f"--nodes is a number of machines, not {nodes}")
    config, _ = load_config_and_model(path, ["cluster.gpu=null", *overrides])
    ranks = config.parallel.ranks * nodes
    if ranks % config.cluster.nodes:
        raise ConfigError(
            f"{config.parallel.ranks} trainer ranks on {config.cluster.nodes} nodes do not scale to {nodes}; "
            "give parallel.ranks and cluster.nodes as overrides"
        )
    return [f"cluster.nodes={nodes}", f"parallel.ranks={ranks // config.cluster.nodes}"]
