"""All trainer ranks as one: calls that go to every rank, and their answers merged."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from megatron_ext.batch.layout import Sample
from megatron_ext.batch.routes import route_dtype
from megatron_ext.config import OptimizerConfig, ParallelConfig
from megatron_ext.joined import JoinedRows
from megatron_ext.parts import NotFinite, TokenPart, merge_routes, merge_routing, merge_tokens, merge_update
from pipeline.cluster.colocation import Apart, TrainerPart, Turns
from pipeline.cluster.placement import on_node
from pipeline.config.precision import RolloutWeights
from pipeline.engine.server import ServerError
from pipeline.objectives import Denominators, ObjectiveConfig
from pipeline.step import PolicyTokens
from pipeline.trainer.losses import LossRow
from pipeline.trainer.phases import PhaseSeconds
from pipeline.trainer.rank import TrainerRank
from pipeline.trainer.waits import ANSWER_S, POLL_S, RankDiedError, Ranks, TrainerError, rank_log
from pipeline.types import Rollout
from pipeline.weights.servers import WeightCheckError, WeightTransferError

if TYPE_CHECKING:
    from megatron_ext.exchange import Exchange
    from megatron_ext.network import Routing
    from pipeline.engine.control import ServerAddress
    from pipeline.weights import WeightDifference, WeightsConfig

_COMPUTING = ("build", "measure", "update_policy", "update_critic", "update_supervised", "restart_optimizer",
              "keep_reference", "begin_save", "resume")  # fmt: skip
_NAMED = 5  # weights in a sentence
_CHANGING = ("build", "resume", "update_policy", "update_supervised")  # the weights


class ServersFailedError(TrainerError, ServerError):
    """A server did not take the weights; no trainer rank is to blame."""


class TrainerGroup(Ranks):
    """All ranks. Start it, build it, call it; every call returns merged answers or raises TrainerError."""

    def __init__(
        self,
        parallel: ParallelConfig,
        *,
        gpus: bool,
        log_directory: Path,
        threads: int,
        timeout_s: float,
        watch: Callable[[], None] = lambda: None,
        nodes: Sequence[str | None] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        """Actors start at once and in the background. Ray must be up.

        timeout_s: of one call. watch: called every second while a call waits; raises to end it.
        nodes: the Ray node of each rank; None: wherever there is room. environment: further variables of each rank.
        """
        self.parallel = parallel
        self._connected: list[ServerAddress] | None = None
        self.sent: list[tuple[int, float]] = []  # bytes and seconds of each sender in the last transfer
        self._held: int | None = None  # version of the weights, while they are those that were sent last
        self._sending = threading.RLock()
        self.turns: Turns = Apart()
        self._loading: list[ray.ObjectRef] = []  # answers of ranks that take samples
        resources: dict[str, Any] = {"num_cpus": 0 if gpus else 1, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
        if environment:  # none: a runtime environment of its own would start other workers
            resources["runtime_env"] = {"env_vars": dict(environment)}
        actor = ray.remote(**resources, concurrency_groups={"watch": 1, "save": 1})(TrainerRank)  # pyright: ignore[reportCallIssue]
        ranks = [
            actor.options(**on_node(node)).remote(r, str(rank_log(log_directory, r)), threads)
            for r, node in enumerate(nodes or [None] * parallel.ranks)
        ]
        super().__init__(ranks, log_directory, timeout_s, watch)

    def build(self, model_path: Path, *args: Any, **kwargs: Any) -> None:
        """Make the process groups and the model on every rank (see TrainerRank.build)."""
        (meeting_point,) = self._wait(self._ask(self.ranks[:1], "meeting_point"), "meeting_point")
        self._call("build", meeting_point, str(Path(model_path).resolve()), self.parallel, *args, **kwargs)

    def load(self, samples: Sequence[Sample]) -> None:
        """Hand the samples to every rank, through the object store once. They take them while this process goes on, and
        their next call raises what went wrong."""
        self._loading = self._ask(self.ranks, "load", [self._put(JoinedRows(list(samples)))])
        self._loaded = len(samples)

    def logprobs(
        self,
        routing: Routing | None = None,
        indices: Sequence[int] | None = None,
        exchange: Exchange | None = None,
    ) -> PolicyTokens:
        """The policy's log-probs of loaded samples; routing, exchange: see Trainer.logprobs."""
        return self._policy(self._call("measure", "logprobs", indices, routing, exchange), indices)

    def record_routes(self, layers: int, num_experts: int) -> PolicyTokens:
        """The policy's log-probs under its own routes, which the loaded samples have from then on."""
        parts = self._call("measure", "logprobs", None, "record")
        routes = merge_routes(parts, self._loaded, layers, route_dtype(num_experts))
        self._call("route", self._put(routes))
        return self._policy(parts, None)

    def reference_logprobs(self) -> list[np.ndarray]:
        """The reference's log-probs [N] of every loaded sample."""
        return merge_tokens(self._call("measure", "reference_logprobs", None), self._loaded)[0]

    def teacher_logprobs(self) -> list[np.ndarray]:
        """The teacher's, where the ranks have one."""
        return merge_tokens(self._call("measure", "teacher_logprobs", None), self._loaded)[0]

    def values(self) -> list[np.ndarray]:
        """The critic's values [N] of every loaded sample."""
        return merge_tokens(self._call("measure", "values", None), self._loaded)[0]

    def update_policy(
        self,
        objective: ObjectiveConfig,
        denominators: Denominators,
        rows: dict[int, LossRow],
        skip_above: float = math.inf,
    ) -> tuple[dict[str, float], PolicyTokens]:
        """One optimizer step on some of the loaded samples, each with its row; see Trainer.update. Returns metrics, and
        what `logprobs` would have said of these samples before it."""
        parts = self._call("update_policy", objective, denominators, *self._put_rows(rows), skip_above)
        return merge_update(parts), self._policy([p.seen for p in parts], list(rows))

    def update_critic(
        self, objective: ObjectiveConfig, denominators: Denominators, rows: dict[int, LossRow]
    ) -> dict[str, float]:
        """One optimizer step of the critic; its metrics, under critic/."""
        metrics = merge_update(self._call("update_critic", objective, denominators, *self._put_rows(rows)))
        return {f"critic/{name.rpartition('/')[2]}": value for name, value in metrics.items()}

    def _put_rows(self, rows: dict[int, LossRow]) -> tuple[list[int], ray.ObjectRef]:
        return list(rows), self._put(JoinedRows(list(rows.values())))

    def _policy(self, parts: list[TokenPart], indices: Sequence[int] | None) -> PolicyTokens:
        count = self._loaded if indices is None else len(indices)
        logprobs, entropy = merge_tokens(parts, count)
        return PolicyTokens(logprobs, entropy, merge_routing(parts))

    def update_supervised(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One supervised step; metrics."""
        return merge_update(self._call("update_supervised", self._put(JoinedRows(list(samples)))))

    def restart_optimizer(self, optimizer: OptimizerConfig) -> None:
        """A new phase of training begins: its own settings, no moments of the last."""
        self._call("restart_optimizer", optimizer)

    def keep_reference(self) -> None:
        """The reference becomes the policy as it is now."""
        self._call("keep_reference")

    def resume(self, checkpoint: Path) -> None:
        """Everything as a training checkpoint has it, which every rank sees."""
        self._call("resume", str(checkpoint.resolve()))

    def save_hf(self, directory: Path) -> None:
        """Write the weights into a Hugging Face directory that exists; rank 0 writes."""
        with self.turns.reading():
            self._call("save_hf", str(directory.resolve()))

    def save_peft(self, directory: Path, base: Path) -> None:
        """Write the adapters, which are those of the model `base`, into a directory for PEFT."""
        with self.turns.reading():
            self._call("save_peft", str(directory.resolve()), str(base.resolve()))

    def release_memory(self, parts: Sequence[TrainerPart]) -> None:
        """Move these to the host on every rank, see Trainer.release_memory."""
        self._call("release_memory", parts)

    def resume_memory(self, parts: Sequence[TrainerPart]) -> None:
        """Move them back."""
        self._call("resume_memory", parts)

    def progress(self) -> tuple[float, float, str] | None:
        """How far rank 0 is with the weights that it reads, sends or writes; None where it does not say so at once.
        From any thread."""
        try:
            done, _ = ray.wait(self._ask(self.ranks[:1], "progress"), timeout=ANSWER_S)
            read, total = ray.get(done[0]) if done else (0, 0)
        except (RayError, TrainerError):  # it has died, which whoever waits for it says
            return None
        return (read / 1e9, total / 1e9, "GB") if total else None

    def where(self) -> list[dict[str, Any]]:
        """Host, Ray node, process, GPUs and NCCL variables of every rank, see TrainerRank.where."""
        return self._call("where")

    def begin_profile(self, ranks: Sequence[int]) -> None:
        """These ranks trace what they compute from now on."""
        self._wait(self._ask([self.ranks[r] for r in ranks], "begin_profile"), "begin_profile", ranks=ranks)

    def end_profile(self, ranks: Sequence[int], folder: Path) -> None:
        """They write their traces into a folder that they see."""
        files = [str(folder / f"trainer_rank{r}.json.gz") for r in ranks]
        answers = [self._ask([self.ranks[r]], "end_profile", file)[0] for r, file in zip(ranks, files, strict=True)]
        self._wait(answers, "end_profile", ranks=ranks)

    def not_finite(self) -> list[list[NotFinite]]:
        """Of every rank, see Trainer.not_finite, of all loaded samples."""
        return self._call("not_finite")

    def weights_not_finite(self) -> list[str]:
        """A sentence for each rank that has some, of those that answer at once: one has failed, others may hang."""
        found = dict[int, list[NotFinite]]()
        with contextlib.suppress(TrainerError, RayError):  # Ray itself is gone
            asked = dict(zip(self._ask(self.ranks, "weights_not_finite"), range(len(self.ranks)), strict=True))
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)[0]:
                with contextlib.suppress(RayError):
                    found[asked[answer]] = ray.get(answer)
        return [f"weights of trainer rank {rank} are not finite: {_listed(own)}" for rank, own in found.items() if own]

    def take_seconds(self) -> list[PhaseSeconds]:
        """Of every rank by phase, since it was asked last."""
        return self._call("take_seconds")

    def begin_save(self, directory: Path) -> None:
        """Begin to write a training checkpoint into an empty directory that every rank sees."""
        self._call("begin_save", str(directory.resolve()))

    def save_written(self) -> bool:
        """Whether every rank has written its part; from any thread, while the ranks do something else. Raises
        TrainerError for what went wrong."""
        return all(self._of_save("save_written", self.ranks))

    def finish_save(self) -> None:
        """Every rank has written: describe the whole. From any thread, too."""
        parts = self._of_save("saved_part", self.ranks)
        self._of_save("describe_save", self.ranks[:1], parts)

    def _of_save(self, method: str, ranks: Sequence[Any], *args: Any) -> list[Any]:
        """Beside what the ranks are called for: says nothing of its waits, and a server that dies costs no save."""
        return self._wait(self._ask(ranks, method, *args), method, watched=False)

    def connect(
        self, servers: Sequence[ServerAddress], config: WeightsConfig, device: str, rounding: RolloutWeights = "same"
    ) -> None:
        """From now on weights go to these servers, see TrainerRank.connect."""
        self.weights_timeout_s = config.timeout_s
        self._way = (config, device, rounding)
        self._connect(servers)

    def _connect(self, servers: Sequence[ServerAddress]) -> None:
        self._connected = None
        config, device, rounding = self._way

        def meet() -> None:
            (meeting,) = self._wait(self._ask(self.ranks[:1], "offer", list(servers), config, device), "connect")
            self._call("connect", config, rounding, meeting)

        self._of_servers(meet)
        self._connected = list(servers)

    def send_weights(self, version: int, servers: Sequence[ServerAddress] | None = None, *, flush: bool = True) -> None:
        """The current weights to these servers, or to those that are connected, under this version. flush: they empty
        their prefix caches.

        Raises TrainerError where a rank gets no further for `weights.timeout_s`, naming it, or has weights that
        are not finite, and ServersFailedError where a server does not take part.
        """
        with self._sending:
            self._held = None
            if servers is not None and list(servers) != self._connected:
                self._connect(servers)
            answers = self._ask(self.ranks, "send_weights", version, flush)
        # rank 0 times its servers; the ranks are looked at once it has had time to say so
        limit, sent = 1.2 * self.weights_timeout_s + POLL_S, list[tuple[int, float]]()
        try:
            self._of_servers(lambda: sent.extend(self._wait(answers, "send_weights", limit, restart=True)))
        except ServersFailedError:
            self._connected = None
            raise
        self.sent = [each for each in sent if each[0]]
        with self._sending:
            self._held = version

    def sent_metrics(self) -> dict[str, float]:
        """Of the last transfer: ranks that sent, and the bytes and seconds of the one that sent most, or longest."""
        if not self.sent:
            return {}
        nbytes, seconds = zip(*self.sent, strict=True)
        return {
            "sync/senders": float(len(self.sent)),
            "sync/bytes_by_sender": float(max(nbytes)),
            "sync/seconds_by_sender": max(seconds),
        }

    def send_again(self, version: int, servers: Sequence[ServerAddress]) -> bool:
        """The weights that were sent last to other servers, under the same version; False where the ranks hold others
        by now. From any thread: no update begins meanwhile."""
        with self._sending:
            if self._held != version:
                return False
            try:
                self.send_weights(version, servers)
            finally:
                self._held = version  # also where a server failed
            return True

    @staticmethod
    def _of_servers(call: Callable[[], Any]) -> None:
        try:
            call()
        except TrainerError as error:
            cause = error.__cause__.cause if isinstance(error.__cause__, RayTaskError) else None
            # servers, too, wait for a rank that sends and stands still
            if error.silent or isinstance(error, RankDiedError):
                raise
            if isinstance(cause, WeightTransferError) and not isinstance(cause, WeightCheckError):
                raise ServersFailedError(str(error)) from error
            raise

    def weight_differences(self) -> list[WeightDifference]:
        """Every tensor that a connected server holds otherwise than the trainer does, bit for bit, by its Hugging Face
        name; an empty list where they agree. The servers must be idle."""
        self.turns.sampling()
        with self.turns.reading():
            return self._call("weight_differences")[0]

    def close(self) -> None:
        """Leave the servers and the process groups."""
        self._call("close")

    def _call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """`method` on every rank, together. Answers in rank order."""
        if method in _COMPUTING:
            self.turns.training()
        with self._sending if method in _CHANGING else contextlib.nullcontext():
            if method in _CHANGING:
                self._held = None
            answers = self._ask(self.ranks, method, *args, **kwargs)
        loading, self._loading = self._loading, []
        if loading:
            self._wait(loading, "load")
        return self._wait(answers, method)


def _listed(wrong: Sequence[NotFinite]) -> str:
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return ", ".join(map(str, wrong[:_NAMED])) + more


def to_sample(rollout: Rollout) -> Sample:
    """A rollout as the trainer reads it, its routes, kept tokens and a teacher's likeliest ones beside it."""
    return Sample(
        rollout.token_ids.astype(np.int32),
        len(rollout.prompt_ids),
        routes=rollout.routes,
        kept=rollout.kept,
        trained=rollout.trained,
        named=None if rollout.teacher is None else rollout.teacher.top_ids,
    )
