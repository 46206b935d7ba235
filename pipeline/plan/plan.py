"""The plan of a configuration: everything `sameroute plan` says, as one object.

A step of the loop is: sample, read the log-probs of the proximal policy (and of the reference, and values) where
they are needed, update, send the weights. Phases follow one another, so their times add up. Where rollout.max_staleness
lets servers sample beside the training, steps are followed under the rule of a run instead: see `beside`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.batch.routes import route_dtype
from megatron_ext.config import ParallelConfig
from megatron_ext.hf.description import ModelDescription, read_description
from pipeline.config import Config
from pipeline.config.file import ConfigError
from pipeline.config.run import COLOCATED_FRACTION
from pipeline.config.server import nodes_of_server, servers_beside
from pipeline.plan.beside import Pace, follow
from pipeline.plan.by_turns import Turns, sent_s, too_little, turns_of
from pipeline.plan.counts import flops
from pipeline.plan.counts.adapters import trained_count
from pipeline.plan.counts.parameters import active, total
from pipeline.plan.hardware import EFFICIENCY, GIB, GPU, GPUS, Efficiency
from pipeline.plan.longest import BASE64, Longest, longest_of
from pipeline.plan.memory import Memory, item_bytes, worst_rank
from pipeline.plan.sampling import Lengths, Sampling, Server, sample, server
from pipeline.plan.weight_transfer import WeightTransfer, weight_transfer
from pipeline.rollout.admission import Admission

SEED = 0
_FOLLOWED = 8  # servers, where rollouts are made beside the training
_STEPS = 6  # steps


@dataclass(frozen=True)
class Seconds:
    """Of the phases of a step. turns: memory moves, where engines take turns on GPUs. pace: of steps whose rollouts are
    made beside the training; None: one after another."""

    rollout: float
    logprobs: float
    update: float
    sync: float
    turns: float = 0.0
    pace: Pace | None = None

    @property
    def train(self) -> float:
        return self.logprobs + self.update

    @property
    def step(self) -> float:
        return self.rollout + self.train + self.sync + self.turns if self.pace is None else self.pace.seconds


@dataclass(frozen=True)
class Work:
    """Of the trainer in a step.

    tokens: prompts and answers. micro_batches: of a data-parallel rank in one optimizer step.
    logprobs, update: FLOPs, recomputation included. model: of both, without it.
    """

    tokens: float
    micro_batches: int
    logprobs: float
    update: float
    model: float


@dataclass(frozen=True)
class Plan:
    """bubble:        share of an update's time that a pipeline stage waits.
    expert_tokens: see `expert_tokens`.
    weights:       sent once a step.
    route_bytes:   of a step's routes as they are kept and go to the trainer; route_wire_bytes: in the servers' answers.
    longest:       what the longest sequence takes.
    turns:         where trainer and servers take turns on their GPUs.
    reasons:       why it cannot run, a sentence each; empty: it fits.
    """

    config: Config
    model: ModelDescription
    gpu: GPU
    lengths: Lengths
    total: int
    active: int
    trained: int
    memory: Memory
    server: Server
    servers: int
    sampling: Sampling
    work: Work
    bubble: float
    expert_tokens: tuple[float, float]
    weights: WeightTransfer
    route_bytes: float
    route_wire_bytes: float
    longest: Longest
    seconds: Seconds
    turns: Turns | None
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.reasons

    @property
    def flops(self) -> float:
        """Of the trainer, recomputation included."""
        return self.work.logprobs + self.work.update


def expected_lengths(config: Config, mean: float | None = None) -> Lengths:
    """Of answers: a lognormal around `mean`, or a third of the longest, where nobody knows yet."""
    longest = config.longest_rollout
    return Lengths(mean or longest / 3, longest)


def cache_bytes(config: Config) -> float:
    """Of an element of the servers' KV cache."""
    return 1.0 if config.precision.kv_cache.startswith("fp8") else item_bytes(config.precision)


def bubble(parallel: ParallelConfig, micro_batches: int) -> float:
    """(p - 1) / (v m + p - 1): the share of a pipelined pass in which a stage waits (2104.04473, section 2.2)."""
    idle = parallel.pipeline - 1
    return idle / ((parallel.virtual_pipeline or 1) * micro_batches + idle)


def make_plan(
    config: Config,
    model: ModelDescription,
    gpu: str,
    *,
    mean_response: float | None = None,
    efficiency: Efficiency = EFFICIENCY,
    quick: bool = False,
) -> Plan:
    """gpu: a name of hardware.GPUS. mean_response: tokens of an answer. quick: leave out
    how long a rollout takes, for a search that asks only what fits.

    Raises ValueError where the model does not divide into the layout.
    """
    config.parallel.check_model(model)
    card, parallel = GPUS[gpu], config.parallel
    lengths, prompt = expected_lengths(config, mean_response), config.data.max_prompt_tokens / 2
    answers = lengths.sample(config.rollout.prompts_per_step * config.rollout.samples_per_prompt, SEED)
    work = step_work(config, model, prompt + answers)
    memory = trainer_memory(config, model, work.micro_batches, efficiency)
    one = server_of(config, model, card, prompt + float(answers.mean()) / 2, efficiency)
    beside = servers_beside(config.rollout_gpus, config.server.tensor_parallel, config.cluster.gpus_per_node)
    servers = config.server.replicas or max(1, beside)
    sampling = Sampling(math.inf, 0.0, math.inf, math.inf)
    if one.fits and not quick:
        sampling = sample(answers, servers, one, prompt)
    sent = weight_transfer(config, model, card, efficiency)
    turns = turns_of(config, memory, card) if config.cluster.colocated else None
    rate = parallel.ranks * card.bf16 * efficiency.train
    passes = config.train.mini_batches * work.micro_batches  # of log-probs, which need not stop between mini-batches
    seconds = Seconds(
        rollout=sampling.rollout,
        logprobs=work.logprobs / rate / (1 - bubble(parallel, passes)),
        update=work.update / rate / (1 - bubble(parallel, work.micro_batches))
        + _offloaded_s(memory, card, config, efficiency),
        sync=sent.seconds if turns is None else sent_s(sent.nbytes, servers, card, efficiency),
        turns=0.0 if turns is None else turns.moves_s,
    )
    if config.rollout.max_staleness and one.fits and not quick:
        seconds = replace(seconds, pace=pace_of(config, lengths, servers, one, prompt, seconds))
    replay = config.replay.of_model(model.num_experts)
    routes = work.tokens * model.num_layers * model.topk if replay.any else 0.0
    kept = routes * np.dtype(route_dtype(model.num_experts)).itemsize
    return Plan(
        config=config,
        model=model,
        gpu=card,
        lengths=lengths,
        total=total(model),
        active=active(model),
        trained=_trained(config, model),
        memory=memory,
        server=one,
        servers=servers,
        sampling=sampling,
        work=work,
        bubble=bubble(parallel, work.micro_batches),
        expert_tokens=expert_tokens(config, model),
        weights=sent,
        route_bytes=kept,
        route_wire_bytes=kept * BASE64 if replay.from_server else 0.0,
        longest=longest_of(config, model, one, servers),
        seconds=seconds,
        turns=turns,
        reasons=tuple(_reasons(config, card, memory, one, turns, efficiency)),
    )


def pace_of(config: Config, lengths: Lengths, servers: int, one: Server, prompt: float, seconds: Seconds) -> Pace:
    """Of a run whose rollouts are made beside the training, which takes so long. Many servers are stood for by some."""
    rollout = config.rollout
    some = min(servers, _FOLLOWED)
    groups = max(1, round(rollout.prompts_per_step * some / servers))
    answers = lengths.sample(groups * rollout.samples_per_prompt * _STEPS, SEED)
    return follow(
        answers.reshape(-1, rollout.samples_per_prompt),
        Admission(groups, rollout.max_staleness, rollout.steps_ahead, order=rollout.order),
        some,
        one,
        prompt,
        train_s=seconds.train,
        sync_s=seconds.sync,
        steps=_STEPS,
    )


def step_work(config: Config, model: ModelDescription, sequences: np.ndarray) -> Work:
    """sequences: [N] tokens of each, prompt and answer."""
    parallel, objective = config.parallel, config.objective.composition()
    tokens, squares = float(sequences.sum()), float((sequences**2).sum())
    per_rank = tokens / config.train.mini_batches / parallel.data
    micro_batches = max(1, math.ceil(per_rank / config.trainer.micro_batch_tokens))
    if parallel.virtual_pipeline:
        micro_batches = math.ceil(micro_batches / parallel.pipeline) * parallel.pipeline
    proximal = config.proximal_pass(config.replay.of_model(model.num_experts))
    passes = proximal + objective.needs_reference + objective.needs_critic
    logprobs = flops.forward(model, tokens, squares) * passes
    if (teacher := teacher_of(config)) is not None:
        logprobs += flops.forward(teacher, tokens, squares)
    trained = 1 + objective.needs_critic
    return Work(
        tokens=tokens,
        micro_batches=micro_batches,
        logprobs=logprobs,
        update=trained * flops.training(model, tokens, squares, recompute=config.trainer.recompute, lora=config.lora),
        model=logprobs + trained * flops.training(model, tokens, squares, lora=config.lora),
    )


def teacher_of(config: Config) -> ModelDescription | None:
    """The model that teaches beside the policy in the trainer; None: none does. Raises ConfigError where it is not
    here."""
    teacher = config.teacher
    if teacher is None or teacher.engine != "trainer" or teacher.path is None:
        return None
    for folder in (teacher.path, teacher.path / "hf"):
        if (folder / "config.json").is_file():
            return read_description(folder)
    raise ConfigError(f"teacher.path: {teacher.path} has no config.json, so its memory is not known")


def trainer_memory(config: Config, model: ModelDescription, micro_batches: int, efficiency: Efficiency) -> Memory:
    """Of the rank that holds most. A sequence longer than a micro-batch has one of its own. Where engines take turns,
    the servers' processes stay beside it."""
    objective = config.objective.composition()
    longest = config.data.max_prompt_tokens + config.longest_rollout
    memory = worst_rank(
        model,
        config.parallel,
        config.trainer,
        config.precision,
        max(config.trainer.micro_batch_tokens, longest),
        micro_batches=micro_batches,
        reference=objective.needs_reference,
        critic=objective.needs_critic,
        lora=config.lora,
        teacher=teacher_of(config),
        replay=config.replay.of_model(model.num_experts).any,
        efficiency=efficiency,
    )
    asleep = efficiency.asleep if config.cluster.colocated else 0.0
    return replace(memory, overhead=memory.overhead + asleep)


def server_of(config: Config, model: ModelDescription, card: GPU, tokens_each: float, efficiency: Efficiency) -> Server:
    """tokens_each: of a running sequence, on average."""
    return server(
        model,
        card,
        tp=config.server.tensor_parallel,
        machines=nodes_of_server(config.server.tensor_parallel, config.cluster.gpus_per_node),
        weight_bytes=item_bytes(config.precision),
        cache_bytes=cache_bytes(config),
        tokens_each=tokens_each,
        longest=config.data.max_prompt_tokens + config.longest_rollout,
        most=config.server.max_running_requests,
        most_tokens=config.server.max_total_tokens,
        static=server_share(config, efficiency),
        efficiency=efficiency,
    )


def server_share(config: Config, efficiency: Efficiency) -> float:
    """Of a GPU's memory, for the weights and the cache of a server."""
    if config.server.mem_fraction_static is not None:
        return config.server.mem_fraction_static
    return COLOCATED_FRACTION if config.cluster.colocated else efficiency.static


def _trained(config: Config, model: ModelDescription) -> int:
    """Parameters, of all ranks together."""
    if config.lora is None:
        return total(model)
    return trained_count(model, ParallelConfig.model_validate({}), config.lora).parameters


def expert_tokens(config: Config, model: ModelDescription) -> tuple[float, float]:
    """(mean, deviation) of the tokens that an expert gets of one micro-batch of the ranks that share its layer's
    experts; the deviation if routers drew at random."""
    if not model.num_experts:
        return 0.0, 0.0
    parallel = config.parallel
    ranks = parallel.expert * (parallel.expert_tensor or parallel.tensor)
    tokens = config.trainer.micro_batch_tokens / parallel.context / parallel.tensor * ranks
    mean = tokens * model.topk / model.num_experts
    return mean, math.sqrt(mean * (1 - model.topk / model.num_experts))


def _offloaded_s(memory: Memory, card: GPU, config: Config, efficiency: Efficiency) -> float:
    """Adam on the CPU, all optimizer steps of a step: of each 16 bytes there, the gradient (4) comes over PCIe, 28 are
    read and written (weight, two moments; the gradient read), and a weight (2) goes back."""
    parameters = memory.host / 16
    once = parameters * ((4 + 2) / card.pcie + (3 * 8 + 4) / efficiency.host_adam)
    return config.train.mini_batches * once


def _reasons(
    config: Config, card: GPU, memory: Memory, one: Server, turns: Turns | None, efficiency: Efficiency
) -> Iterator[str]:
    if turns is not None:
        yield from too_little(turns, memory, server_share(config, efficiency), card, efficiency)
    servers, size = config.server.replicas or 1, config.server.tensor_parallel
    machine = config.cluster.gpus_per_node
    if servers_beside(config.rollout_gpus, size, machine) < servers:
        takes = f"a server takes {size}" if servers == 1 else f"{servers} servers take {size} each"
        whole = f", on {nodes_of_server(size, machine)} whole machines each" if size > machine else ""
        yield (
            f"{config.cluster.nodes} x {machine} GPUs less {config.parallel.ranks} of the trainer "
            f"leave {config.rollout_gpus}, and {takes}{whole}"
        )
    if memory.total > card.memory:
        yield (
            f"a trainer rank of pipeline stage {memory.stage} needs {memory.total / GIB:.1f} GiB of the {card.name}'s "
            f"{card.memory / GIB:.1f}"
        )
    if memory.host > card.host:
        yield (
            f"the optimizer states of a rank take {memory.host / GIB:.0f} GiB of its machine's memory, "
            f"of {card.host / GIB:.0f} a GPU"
        )
    if not one.fits:
        longest = config.data.max_prompt_tokens + config.longest_rollout
        yield (
            f"a server on {one.gpus} GPUs holds {one.weights / GIB:.1f} GiB of weights on each and has room for "
            f"{one.cache_tokens:,} tokens of KV cache, less than one sequence of {longest:,}"
        )
    total_tokens = config.server.max_total_tokens
    if total_tokens is not None and total_tokens > one.cache_tokens:
        yield f"server.max_total_tokens={total_tokens:,} is more than the {one.cache_tokens:,} that fit"
