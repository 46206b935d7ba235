"""The loop on both real engines: what its steps say, and what stops it."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from megatron_ext.batch.layout import Sample
from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from megatron_ext.parts import merge_update
from pipeline.config import load_config
from pipeline.engine.decoder import AnswerError
from pipeline.loop.compare import DisagreementError
from pipeline.loop.open_loop import open_loop
from pipeline.objectives import Denominators, ObjectiveConfig, resolve
from pipeline.trainer.group import to_sample
from pipeline.trainer.losses import LossRow, policy_loss
from pipeline.trainer.waits import RankDiedError
from tests.support.command import KEYS, QUICKSTART, SMALL
from tests.support.ranks import run_ranks
from tests.support.sockets import environment_has, listening, reachable


class OverError(Exception):
    """Ends a loop as a failed run ends it: at once."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    (folder / "logs").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SAMEROUTE_MARK", folder.name)  # in the environment of all its processes
        config = load_config(QUICKSTART, [*SMALL, "weights.transport=distributed", "debug.dump_rollouts=true"])
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(threads + 1)
        with contextlib.suppress(OverError), open_loop(config, folder, folder / "logs") as opened:
            yield opened
            raise OverError  # the last test kills the trainer
        assert torch.get_num_threads() == threads + 1


@pytest.fixture
def loop(session):
    return session[0]


@pytest.mark.slow
def test_engines_agree_to_1e_4_before_and_after_ten_updates_and_transfers(loop):
    for number in range(1, 11):
        result = loop.step(number)
        metrics, groups = result.metrics, result.batch.groups
        assert metrics.keys() >= KEYS
        assert metrics["mismatch/max_abs_logprob"] < 1e-4
        assert metrics["routing/replayed_fraction"] == 1.0
        assert metrics["weights/version"] == number
        assert metrics["train/grad_norm"] >= 0
        assert len(groups) == 8
        assert all(len(g.rollouts) == 4 == len(g.rewards) for g in groups)
        assert all((r.weight_versions == number).all() for g in groups for r in g.rollouts)
    assert loop.fleet.version == 11
    loop.probe()


@pytest.mark.slow
def test_no_thread_of_the_controllers_torch_takes_a_core_of_an_engine(loop):
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_no_other_machine_reaches_a_socket_of_a_run(loop, session):
    processes = [psutil.Process(), *environment_has(f"SAMEROUTE_MARK={session[1].parent.name}".encode())]
    sockets = listening(processes)
    names = " ".join(socket.process for socket in sockets)
    assert {"gcs_server", "raylet"} <= set(names.split())
    assert loop.fleet.servers[0].client.url.rpartition(":")[2] in {str(socket.port) for socket in sockets}
    found = reachable(sockets)
    assert found == [], "\n".join(map(str, found))


@pytest.mark.slow
def test_no_command_line_environment_or_file_of_a_run_has_a_key(loop, session):
    (server,) = loop.fleet.servers
    keys = [key.encode() for key in (server.process.keys.api, server.process.keys.admin)]
    found = []
    for process in Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            try:
                text = (process / name).read_bytes() if process.name.isdigit() else b""
            except OSError:  # gone meanwhile, or another user's
                continue
            found += [process / name for key in keys if key in text]
    files = [file for file in session[1].parent.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {
        "sglang.log",
        "trainer_rank0.log",
        "config.json",
        "step_000001.safetensors",
    }
    found += [file for file in files if any(key in file.read_bytes() for key in keys)]
    assert found == []


def gspo_update(config: ParallelConfig, model: str, samples: list[Sample]):
    """Runs on a rank: proximal log-probs of rollouts that another policy sampled, then one GSPO update."""
    from megatron_ext.trainer import Trainer

    trainer = Trainer(model, config, TrainerConfig(micro_batch_tokens=128), OptimizerConfig(lr=1e-3), replay=True)
    advantages = np.random.default_rng(0).normal(size=len(samples))
    rows = [replace(s.row, advantage=float(a)) for s, a in zip(samples, advantages, strict=True)]
    tokens = sum(s.response_length for s in samples)
    objective = resolve(ObjectiveConfig(preset="gspo", clip_low=0.02, clip_high=0.03))
    loss = policy_loss(objective, Denominators(len(samples), tokens, max_length=16))
    return trainer.update([replace(s, row=row) for s, row in zip(samples, rows, strict=True)], loss)


@pytest.mark.slow
def test_the_same_rollouts_give_the_same_first_step_on_every_layout(session):
    loop, model = session
    rollouts = loop.step(11).batch.rollouts
    samples = [replace(to_sample(r), row=LossRow(r.rollout_logprobs, r.rollout_logprobs, 0.0)) for r in rollouts]
    layouts = [
        {},
        {"ranks": 2, "expert": 2},
        {"ranks": 2, "tensor": 2, "sequence": True},
        {"ranks": 2, "pipeline": 2},
    ]
    one, *others = [
        merge_update(run_ranks(gspo_update, ParallelConfig(**layout), str(model), samples)) for layout in layouts
    ]
    assert one["train/grad_norm"] > 0
    assert 0 < one["loss/clip_fraction"] < 1
    for other in others:
        assert other["loss/objective"] == pytest.approx(one["loss/objective"], rel=1e-4)
        assert other["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert other["loss/clip_fraction"] == one["loss/clip_fraction"]


@pytest.mark.slow
def test_weights_that_did_not_arrive_stop_the_run(loop):
    pairs = loop.source.take_supervised(16)
    loop.trainers.update_supervised([Sample(p.tokens, p.prompt_length) for p in pairs])
    with pytest.raises(DisagreementError, match=r"differ by .* the weight transfer failed, or"):
        loop.probe()
    loop.sync()
    loop.probe()


@pytest.mark.slow
def test_tokens_of_an_older_version_stop_the_run(loop):
    (server,) = loop.fleet.servers
    server.client.set_weight_version(loop.fleet.version - 1)
    with pytest.raises(AnswerError, match=r"tokens came from weights \[\d+\], the fleet held"):
        loop.probe()
    server.client.set_weight_version(loop.fleet.version)


@pytest.mark.slow
def test_a_trainer_rank_that_is_killed_is_one_that_died(loop):
    (rank,) = loop.trainers.ranks
    os.kill(ray.get(rank.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    with pytest.raises(RankDiedError, match=r"trainer rank 0 died during .*; its log: .*trainer_rank0\.log"):
        loop.step(12)
