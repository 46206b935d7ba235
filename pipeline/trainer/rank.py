"""One trainer rank: a Ray actor, a process of its own whose log is in the run directory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import NotFinite, TokenPart, UpdatePart
from pipeline.cluster.threads import thread_environment
from pipeline.config.precision import RolloutWeights
from pipeline.imports import lasting_imports
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.trainer.phases import PhaseClock, PhaseSeconds, timed

if TYPE_CHECKING:
    from megatron_ext.batch.layout import Sample
    from megatron_ext.checkpoint.staged_save import Part, StagedSave
    from megatron_ext.hf.bucket import Bucket
    from megatron_ext.joined import JoinedRows
    from pipeline.cluster.colocation import TrainerPart
    from pipeline.engine.control import ServerAddress
    from pipeline.trainer.losses import LossRow
    from pipeline.weights import FurtherSender, Meeting, WeightDifference, WeightsConfig, WeightSender

_SMALL = 1 << 24  # bytes of weights that are worth no call of their own
_NO_MASK = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def own_gpu(given: Sequence[str], environment: Mapping[str, str]) -> str:
    """The number by which a rank's process knows the GPU that Ray gave it: 0, the only one that Ray lets it see, or
    Ray's own number where the environment forbids that. given: as Ray counts them; none on a CPU."""
    sees_all = environment.get(_NO_MASK, "").lower() in ("1", "true")
    return str(given[0]) if given and sees_all else "0"


class TrainerRank:
    """One rank. Runs inside a Ray actor; nothing of Megatron is imported before `build`."""

    def __init__(self, rank: int, log_path: str, threads: int):
        os.environ |= thread_environment(threads)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        self.rank, self.threads = rank, threads
        self.samples: Any = []  # a list of Sample
        self.clock = PhaseClock()
        self.sender: WeightSender | FurtherSender | None = None
        self.save: StagedSave | None = None

    def meeting_point(self) -> str:
        """Where the ranks meet: an address and a free port of this rank's machine."""
        import socket

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def where(self) -> dict[str, Any]:
        """This rank's host, Ray node, process, GPUs and what it was told of NCCL."""
        import socket

        context = ray.get_runtime_context()
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "node": context.get_node_id(),
            "pid": os.getpid(),
            "gpus": context.get_accelerator_ids().get("GPU", []),
            "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        }

    def build(
        self,
        meeting_point: str,
        model_path: str,
        parallel_config: ParallelConfig,
        trainer: TrainerConfig,
        optimizer: OptimizerConfig,
        *,
        seed: int,
        **settings: Any,
    ) -> None:
        """Join the world, build the trainer (`settings` are Trainer's own), load its weights."""
        with lasting_imports():
            import torch
            import torch._dynamo  # the first optimizer does

            from megatron_ext import collective_clock, parallel
            from megatron_ext.trainer import Trainer

        torch.set_num_threads(self.threads)
        collective_clock.install()
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        os.environ["LOCAL_RANK"] = own_gpu(gpus, os.environ)
        parallel.initialize(parallel_config, rank=self.rank, init_method=meeting_point, seed=seed)
        self.trainer = Trainer(model_path, parallel_config, trainer, optimizer, seed=seed, **settings)

    @timed("load")
    def load(self, samples: Sequence[ray.ObjectRef]) -> None:
        """Keep the samples that everything up to the next `load` works on. samples: one reference to the list: Ray
        fetches what stands in a list only here, so that a rank which is late to have them is seen to be."""
        self.samples = None  # where they do not come, whatever asks for some fails
        (joined,) = ray.get(list(samples))
        self.samples = joined.rows

    def route(self, routes: list[np.ndarray]) -> None:
        """Give every loaded sample these routes."""
        self.samples = [replace(s, routes=r) for s, r in zip(self.samples, routes, strict=True)]

    @timed(lambda rank, method, *_: method)
    def measure(self, method: str, indices: Sequence[int] | None, *args: Any) -> TokenPart:
        """`logprobs`, those of the reference or a teacher, or `values` of loaded samples, all of them by default."""
        samples = self.samples if indices is None else [self.samples[i] for i in indices]
        return getattr(self.trainer, method)(samples, *args)

    @timed("update")
    def update_policy(
        self,
        objective: ObjectiveConfig,
        denominators: Denominators,
        indices: list[int],
        rows: JoinedRows[LossRow],
        skip_above: float,
    ) -> UpdatePart:
        """One optimizer step on some of the loaded samples. rows: what the loss reads of each. skip_above: see
        Trainer.update."""
        from pipeline.trainer.losses import policy_loss

        loss = policy_loss(resolve(objective), denominators, indices)
        return self.trainer.update(self._with(indices, rows), loss, skip_above)

    @timed("critic")
    def update_critic(
        self, objective: ObjectiveConfig, denominators: Denominators, indices: list[int], rows: JoinedRows[LossRow]
    ) -> UpdatePart:
        """The same for the critic."""
        from pipeline.trainer.losses import critic_loss

        loss = critic_loss(resolve(objective), denominators, indices)
        return self.trainer.update_critic(self._with(indices, rows), loss)

    def _with(self, indices: list[int], rows: JoinedRows[LossRow]) -> list[Sample]:
        return [replace(self.samples[i], row=row) for i, row in zip(indices, rows.rows, strict=True)]

    def update_supervised(self, samples: JoinedRows[Sample]) -> UpdatePart:
        """One optimizer step on the likelihood of the samples' responses."""
        from pipeline.trainer.losses import supervised_loss

        return self.trainer.update(samples.rows, supervised_loss(sum(s.response_length for s in samples.rows)))

    def begin_profile(self) -> None:
        """Trace what this rank computes from now on."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self.profile.start()

    def end_profile(self, file: str) -> None:
        """Write the trace."""
        self.profile.stop()
        self.profile.export_chrome_trace(file)
        del self.profile

    def not_finite(self) -> list[NotFinite]:
        """See Trainer.not_finite, of all loaded samples."""
        return self.trainer.not_finite(self.samples)

    @ray.method(concurrency_group="watch")
    def weights_not_finite(self) -> list[NotFinite]:
        """See Trainer.weights_not_finite; answered while another method runs, or waits in a collective."""
        return self.trainer.weights_not_finite() if hasattr(self, "trainer") else []

    def take_seconds(self) -> PhaseSeconds:
        """By phase, since it was asked last."""
        return self.clock.take()

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """A new phase of training begins: its own settings, no moments of the last."""
        self.trainer.restart_optimizer(optimizer)

    def keep_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        self.trainer.keep_reference()

    def offer(self, servers: list[ServerAddress], config: WeightsConfig, device: str) -> Meeting | None:
        """On rank 0: from now on weights go to these servers, once all ranks have connected. Where other ranks that
        send are to meet them; None: this one is alone."""
        from pipeline.weights import WeightSender, WeightTransferError

        with contextlib.suppress(WeightTransferError):  # one that hangs is left all the same
            self.close()
        senders = self.trainer.exporter.senders(config.senders)
        names = frozenset(name for name, _ in self.trainer.exporter.outputs()) if len(senders) > 1 else frozenset()
        model = self.trainer.policy.model
        own = model.family.indexer_modules(model.hf)
        self.sender = WeightSender(servers, config, device=device, senders=senders, names=names, own=own)
        return self.sender.offer()

    def connect(self, config: WeightsConfig, rounding: RolloutWeights, meeting: Meeting | None) -> None:
        """Meet the servers, those of rank 0's `offer`, whose answer is `meeting`. rounding: weights are rounded as the
        servers are to compute with them."""
        self.trainer.exporter.bucket_bytes = config.bucket_bytes
        self.rollout_weights: RolloutWeights = rounding
        self.senders = None if meeting is None else meeting.senders
        if self.rank:
            self.close()
            if meeting is not None and self.rank in meeting.senders:
                from pipeline.weights import FurtherSender

                self.sender = FurtherSender(meeting, self.rank, config)
        if self.sender is not None:
            self.sender.connect()

    @timed(lambda rank, *_: "gather" if rank.sender is None else "sync")
    def send_weights(self, version: int, flush: bool) -> tuple[int, float]:
        """Stream the weights to the servers. Every rank takes part in gathering; senders send. Returns the bytes that
        this rank sent, and the seconds that it took."""
        rounds = self._rounds()
        try:
            if self.sender is not None:
                self.sender.send_rounds(rounds, version, flush=flush)
        finally:
            _walk(rounds)  # whatever a server does, no rank waits for this one
        return (0, 0.0) if self.sender is None else (self.sender.sent.nbytes, self.sender.sent.seconds)

    def release_memory(self, parts: Sequence[TrainerPart]) -> None:
        """See Trainer.release_memory; before `build` there is nothing."""
        for part in parts if hasattr(self, "trainer") else ():
            self.trainer.release_memory(part)

    def resume_memory(self, parts: Sequence[TrainerPart]) -> None:
        """See Trainer.resume_memory."""
        for part in parts if hasattr(self, "trainer") else ():
            self.trainer.resume_memory(part)

    def begin_save(self, directory: str) -> None:
        """Begin to write a training checkpoint into an empty directory that every rank sees."""
        self.save = self.trainer.begin_save(Path(directory))

    @ray.method(concurrency_group="save")
    def save_written(self) -> bool:
        """Whether this rank has written its part; answered while another method runs. Raises what went wrong."""
        assert self.save is not None
        return self.save.written()

    @ray.method(concurrency_group="save")
    def saved_part(self) -> Part:
        """What the first rank has to know of this one's part, which is written."""
        assert self.save is not None
        return self.save.part()

    @ray.method(concurrency_group="save")
    def describe_save(self, parts: list[Part]) -> None:
        """On the first rank: every rank has written, describe the whole. Done while another method runs."""
        assert self.save is not None
        self.save.describe(parts)

    def resume(self, directory: str) -> None:
        """Everything as a training checkpoint has it."""
        self.trainer.resume(Path(directory))

    def weight_differences(self) -> list[WeightDifference]:
        """On rank 0, what the servers hold otherwise than the trainer would send it."""
        from pipeline.weights import WeightSender

        if isinstance(self.sender, WeightSender):
            return self.sender.differences(self._sent())
        _walk(self._sent())
        return []

    def _rounds(self) -> Iterator[list[Bucket]]:
        """What this rank sends of the weights, as the servers are to hold them; with one sender it is rank 0. Raises
        NotFiniteWeightsError at its end."""
        from megatron_ext.hf.bucket import join_small
        from pipeline.weights import FiniteWeights

        finite = FiniteWeights()
        if self.senders is None:
            limit = min(_SMALL, self.trainer.exporter.bucket_bytes)
            sent = self._rounded(finite.passing(self.trainer.export(everywhere=False)))
            yield from ([bucket] for bucket in join_small(sent, limit))
        else:
            for buckets in self.trainer.share(self.senders):
                yield list(self._rounded(finite.passing(buckets)))
        if self.sender is not None:
            finite.check()

    def _sent(self) -> Iterator[Bucket]:
        """On rank 0, the weights as the servers are to hold them."""
        return self._rounded(self.trainer.export(everywhere=False))

    def _rounded(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        from pipeline.weights.rounding import rounded

        return rounded(buckets, self.rollout_weights, self.trainer.policy.model.family.kept_whole)

    @ray.method(concurrency_group="watch")
    def position(self) -> int:
        """Buckets that this rank has passed in the stream of weights; answered while another method runs."""
        return self.trainer.exporter.position if hasattr(self, "trainer") else 0

    @ray.method(concurrency_group="watch")
    def progress(self) -> tuple[int, int]:
        """Bytes of weights that this rank has read or passed on, and of how many; answered likewise."""
        from megatron_ext.progress import WEIGHTS

        return WEIGHTS.done, WEIGHTS.total

    @ray.method(concurrency_group="watch")
    def servers_awaited(self) -> list[str]:
        """See WeightSender.awaited; answered while another method runs."""
        return [] if self.sender is None else self.sender.awaited()

    def save_hf(self, directory: str) -> None:
        """Write the weights into a Hugging Face directory. Rank 0 writes."""
        from megatron_ext.hf.writer import write_weights

        buckets = self.trainer.export(everywhere=False)
        if self.rank == 0:
            tensors = (pair for bucket in buckets for pair in bucket)
            write_weights(self.trainer.exporter.outputs(), tensors, Path(directory))
        else:
            _walk(buckets)

    def save_peft(self, directory: str, base: str) -> None:
        """Write the adapters into a directory, as PEFT has them. Rank 0 writes. base: see peft_config."""
        from megatron_ext.lora.peft import write_peft
        from megatron_ext.lora.whole import whole_adapters

        policy = self.trainer.policy
        whole = whole_adapters(policy.chunks)
        if self.rank == 0:
            assert policy.lora is not None
            Path(directory).mkdir(exist_ok=True)
            write_peft(Path(directory), policy.model, policy.lora, base, whole.__getitem__)

    def close(self) -> None:
        """Leave the servers."""
        sender, self.sender = self.sender, None
        if sender is not None:
            sender.close()


def _walk(stream: Iterator[Any]) -> None:
    """Take part in a stream whose tensors go elsewhere."""
    for _ in stream:
        pass
