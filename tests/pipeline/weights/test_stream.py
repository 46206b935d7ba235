"""The stream of two expert-parallel ranks to a real server: what arrived is compared, who stalls is named."""

from __future__ import annotations

import contextlib
import os
import re
import signal

import psutil
import pytest
import ray

from pipeline import waiting
from pipeline.config import load_config
from pipeline.engine.processes import TOKEN_VARIABLE, processes_of
from pipeline.loop.open_loop import open_loop
from pipeline.trainer import waits as trainer_waits
from pipeline.trainer.group import ServersFailedError
from pipeline.trainer.waits import TrainerError
from pipeline.weights import WeightsConfig, WeightSender
from tests.support.processes import command_line

SETTINGS = ["supervised.steps=0", "parallel={ranks: 2, expert: 2}",
            "weights={timeout_s: 3, checksum_every: 1, bucket_bytes: 200000}"]  # fmt: skip
EXPERT = "model.layers.2.mlp.experts.6.up_proj.weight"  # rank 1 holds it


class OverError(Exception):
    """Ends a loop as a failed run ends it: at once."""


@pytest.fixture(scope="module")
def loop(preloaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    (folder / "logs").mkdir()
    config = load_config("configs/quickstart.yaml", SETTINGS)
    with contextlib.suppress(OverError), open_loop(config, folder, folder / "logs") as (loop, _):
        yield loop
        raise OverError  # the last test leaves a rank waiting for one that has given up


def url(loop):
    return loop.fleet.addresses[0].url


def tensor(loop, name):
    def find(rank):
        return [t.clone() for bucket in rank.trainer.export() for n, t in bucket if n == name]

    (first, *_), *_ = ray.get([rank.__ray_call__.remote(find) for rank in loop.trainers.ranks])
    return first


@contextlib.contextmanager
def stopped(pid: int):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_one_stale_expert_is_named_and_the_next_transfer_replaces_it(loop):
    assert loop.trainers.weight_differences() == []
    stale = WeightSender(loop.fleet.addresses, WeightsConfig(checksum_every=0), device="cpu")
    stale.connect()
    stale.send([[(EXPERT, tensor(loop, EXPERT) * 1.001)]], 0)
    stale.close()
    (found,) = loop.trainers.weight_differences()
    assert (found.name, found.server, found.kind) == (EXPERT, url(loop), "differs")
    loop.sync()
    assert loop.fleet.servers[0].client.weight_version() == loop.fleet.version
    assert loop.trainers.weight_differences() == []


@pytest.mark.slow
def test_a_transfer_that_leaves_an_expert_stale_stops_the_run(loop):
    def lose(rank, name):
        rank.export, export = rank.trainer.export, rank.trainer.export
        rank.trainer.export = lambda **where: (
            [(n.replace(".experts.", ".expert.") if n == name else n, t) for n, t in bucket]
            for bucket in export(**where)
        )

    def restore(rank):
        rank.trainer.export = rank.export

    everyone = loop.trainers.ranks
    ray.get([rank.__ray_call__.remote(lose, EXPERT) for rank in everyone])
    lost = re.escape(EXPERT.replace(".experts.", ".expert."))
    with pytest.raises(TrainerError, match=rf"do not hold what was sent: {lost} \(ignored at {url(loop)}\)"):
        loop.sync()
    ray.get([rank.__ray_call__.remote(restore) for rank in everyone])
    loop.sync()


@pytest.mark.slow
def test_a_rank_and_a_server_that_stall_are_named(loop, monkeypatch):
    monkeypatch.setattr(trainer_waits, "ANSWER_S", 1.0)
    pid = ray.get(loop.trainers.ranks[1].__ray_call__.remote(lambda _: os.getpid()))
    with stopped(pid), pytest.raises(TrainerError, match=r"send_weights in [\d.]+ s; rank 1 does not answer[^;]*$"):
        loop.sync()
    loop.sync()  # it goes on, and the transfer it held up is finished first

    port = url(loop).rpartition(":")[2]
    server = next(p for p in psutil.Process().children(recursive=True) if port in command_line(p).split())
    (scheduler,) = [
        process.pid
        for process in processes_of(server.environ()[TOKEN_VARIABLE])
        if "sglang::scheduler" in command_line(process)
    ]
    said = []
    monkeypatch.setattr(waiting, "FIRST_S", 1.0)
    monkeypatch.setattr(loop.trainers, "waiting", waiting.Waiting(said.append))
    with stopped(scheduler), pytest.raises(ServersFailedError, match=rf"{url(loop)}\S* did not answer in 3 s"):
        loop.trainers.send_weights(loop.fleet.version + 1)
    # who is waited for is the server, not the rank that asks it
    assert re.match(
        rf"waiting for trainer rank.* 0.*\(the server {url(loop)} has not answered; its log: \S+\)", said[0]
    )
