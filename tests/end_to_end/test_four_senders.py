"""Both engines: four trainer ranks send their shares to two servers of two ranks each, a step is exact, and a rank that
stands still or dies is named."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import ray

from pipeline.config import load_config
from pipeline.loop.open_loop import open_loop
from pipeline.trainer import waits as trainer_waits
from pipeline.trainer.group import ServersFailedError
from pipeline.trainer.waits import RankDiedError, TrainerError

SETTINGS = ["supervised.steps=0", "parallel={ranks: 4, pipeline: 2, expert: 2}",
            "server={replicas: 2, tensor_parallel: 2}", "train.steps=1",
            "weights={transport: distributed, timeout_s: 10, checksum_every: 1, bucket_bytes: 200000}"]  # fmt: skip


class OverError(Exception):
    """Ends a loop as a failed run ends it: at once."""


@pytest.mark.proof
@pytest.mark.usefixtures("preloaded")
def test_four_ranks_send_to_two_servers_of_two(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    config = load_config("configs/quickstart.yaml", SETTINGS)
    with contextlib.suppress(OverError), open_loop(config, tmp_path, tmp_path / "logs") as (loop, _):
        result = loop.step(1)
        assert result.metrics["mismatch/abs_logprob"] < 1e-5
        sent = [nbytes for nbytes, _ in loop.trainers.sent]
        assert result.metrics["sync/senders"] == len(sent) == 4
        assert result.metrics["sync/bytes_by_sender"] == max(sent) < 0.3 * sum(sent)
        # compared after each transfer with the senders' checksums, and here with those of the stream to rank 0
        assert loop.trainers.weight_differences() == []

        monkeypatch.setattr(trainer_waits, "ANSWER_S", 1.0)
        third, last = ray.get([r.__ray_call__.remote(lambda _: os.getpid()) for r in loop.trainers.ranks[2:]])
        os.kill(third, signal.SIGSTOP)
        with pytest.raises(TrainerError, match=r"rank 2 does not answer") as raised:
            loop.trainers.send_weights(loop.fleet.version + 1)
        assert not isinstance(raised.value, ServersFailedError)
        os.kill(third, signal.SIGCONT)
        loop.sync()  # it goes on, and the transfer it held up is finished first
        os.kill(last, signal.SIGKILL)
        with pytest.raises(RankDiedError, match="trainer rank 3 died"):
            loop.trainers.send_weights(loop.fleet.version + 1)
        raise OverError
