"""Several ranks send their shares of the weights at the same time: what arrives, how much each sends, what goes wrong.

Ranks and servers' ranks meet in real gloo groups; the servers are without engines.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.config import OptimizerConfig, ParallelConfig, TrainerConfig
from pipeline.engine.control import ServerAddress
from pipeline.weights import WeightsConfig
from tests.support.ranks import run_ranks
from tests.support.tiny_families import save_family
from tests.support.weight_receivers import Receiver, receivers

BOUND = 100_000
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    """A transfer to servers. plant: (what is wrong, at which rank)."""

    urls: tuple[str, ...]
    senders: int
    plant: tuple[str, int] | None = None
    timeout_s: float = 30.0


def to(servers: list[Receiver], senders: int, *plant: Any, **settings: Any) -> Case:
    return Case(tuple(s.url for s in servers), senders, plant or None, **settings)


def transfers(config: ParallelConfig, model: str, cases: list[Case]) -> list[tuple[int, str]]:
    """Runs on a rank: of each case, the bytes that it sent, and the error."""
    import torch.distributed as dist

    from megatron_ext.trainer import Trainer
    from pipeline.trainer.phases import PhaseClock
    from pipeline.trainer.rank import TrainerRank

    rank = TrainerRank.__new__(TrainerRank)
    rank.rank, rank.sender, rank.clock = dist.get_rank(), None, PhaseClock()
    rank.trainer = Trainer(model, config, TrainerConfig(), OptimizerConfig(), replay=False)
    out = []
    for number, case in enumerate(cases):
        out.append(_transfer(rank, case, version=1 + number))
        dist.barrier()
    with contextlib.suppress(Exception):
        rank.close()
    return out


def _transfer(rank, case: Case, version: int) -> tuple[int, str]:
    import torch.distributed as dist

    weights = WeightsConfig(
        transport="distributed",
        senders=case.senders,
        bucket_bytes=BOUND,
        timeout_s=case.timeout_s,
        checksum_every=1,
    )
    offered = [rank.offer([ServerAddress(url) for url in case.urls], weights, "cpu") if rank.rank == 0 else None]
    dist.broadcast_object_list(offered)
    share, planted = rank.trainer.share, case.plant if case.plant and case.plant[1] == rank.rank else ("nothing", 0)
    if planted[0] in PLANTS:
        rank.trainer.share = lambda senders: PLANTS[planted[0]](share(senders))
    try:
        rank.connect(weights, "same", offered[0])
        sent, _ = rank.send_weights(version + (planted[0] == "version"), True)
        return sent, ""
    except Exception as error:
        return 0, f"{type(error).__name__}: {error}"
    finally:
        rank.trainer.share = share


def twice(rounds):
    """The first tensor goes under another's name."""
    for number, buckets in enumerate(rounds):
        if number == 0:
            ((_, tensor), *rest), *more = buckets
            buckets = [[(EMBEDDING, tensor), *rest], *more]
        yield buckets


def dropped(rounds):
    """The first tensor is left out."""
    for number, buckets in enumerate(rounds):
        yield [bucket for bucket in (buckets[0][1:], *buckets[1:]) if bucket] if number == 0 else buckets


def broken(rounds):
    """The trainer fails in its second round."""
    for number, buckets in enumerate(rounds):
        if number == 1:
            raise RuntimeError("out of memory")
        yield buckets


PLANTS = {"twice": twice, "dropped": dropped, "broken": broken}


@pytest.fixture(scope="module", autouse=True)
def loopback():
    """Where the servers' ranks meet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


def run(model, layout: dict[str, int], cases: list[Case]) -> list[list[tuple[int, str]]]:
    """Of each case, every rank's answer."""
    answers = run_ranks(transfers, ParallelConfig(**layout), str(model), cases)
    return [list(of_case) for of_case in zip(*answers, strict=True)]


def whole(servers: list[Receiver], original) -> None:
    """Every rank of every server holds the model bit for bit, and each tensor came once."""
    for server in servers:
        assert server.came == dict.fromkeys(original, 1)
        for held in server.held:
            assert held.keys() == original.keys()
            for name, tensor in held.items():
                assert torch.equal(tensor, original[name]), name


def test_bytes_by_sender_fall_as_senders_are_added_and_every_tensor_arrives_once(tiny_model_dir):
    original = load_file(tiny_model_dir / "model.safetensors")
    total = sum(t.nbytes for t in original.values())
    with contextlib.ExitStack() as stack:
        sets = [stack.enter_context(receivers(2, ranks=2)) for _ in range(4)]
        layout = {"ranks": 4, "pipeline": 2, "expert": 2}
        cases = [to(servers, senders) for servers, senders in zip(sets, (1, 2, 3, 4), strict=True)]
        by_senders = run(tiny_model_dir, layout, cases)
    for number, (servers, answers) in enumerate(zip(sets, by_senders, strict=True), start=1):
        assert [error for _, error in answers] == [""] * 4
        sent = [nbytes for nbytes, _ in answers if nbytes]
        assert len(sent) == number
        assert sum(sent) == total
        assert max(sent) < 1.25 * total / number if number != 3 else max(sent) < 0.6 * total
        assert {server.version for server in servers} == {str(number)}
        assert max(servers[0].together) == number
        begin, *updates = [c for c in servers[0].calls if c != "/weights_checker" and not c.endswith("_group")]
        assert begin == "/begin_weight_update"
        assert set(updates[:-3]) == {"/update_weights_from_distributed"}
        assert set(updates[-3:]) == {"/end_weight_update", "/flush_cache", "/update_weight_version"}
        whole(servers, original)


@pytest.mark.parametrize(
    ("family", "layout", "count"),
    [
        ("qwen3_moe", {"ranks": 2, "pipeline": 2}, 2),
        ("qwen3_moe", {"ranks": 4, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}, 4),
        ("gpt_oss", {"ranks": 2, "expert": 2}, 2),  # its tensors pack the experts of all ranks
        pytest.param("qwen3_moe", {"ranks": 2, "expert": 2}, 2, marks=pytest.mark.proof),
        pytest.param("qwen3_moe", {"ranks": 4, "expert": 2}, 4, marks=pytest.mark.proof),
        pytest.param("qwen3_moe", {"ranks": 2, "tensor": 2, "sequence": True}, 2, marks=pytest.mark.proof),
        pytest.param(
            "gpt_oss",
            {"ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 2},
            8,
            marks=pytest.mark.proof,
        ),
        pytest.param("deepseek_v3", {"ranks": 4, "pipeline": 2, "expert": 2}, 4, marks=pytest.mark.proof),  # joined
    ],
    ids=str,
)
def test_layouts(tiny_model_dir, tmp_path, family, layout, count):
    model = tiny_model_dir if family == "qwen3_moe" else save_family(family, tmp_path / "model")
    original = load_file(model / "model.safetensors")
    with receivers(1, ranks=2) as servers:
        (answers,) = run(model, layout, [to(servers, 8)])
        assert [error for _, error in answers] == [""] * layout["ranks"]
        sent = [nbytes for nbytes, _ in answers if nbytes]
        assert len(sent) == count
        assert sum(sent) == sum(t.nbytes for t in original.values())
        whole(servers, original)


def test_what_goes_wrong_is_told_by_all_senders_and_the_next_servers_get_the_weights(tiny_model_dir):
    original = load_file(tiny_model_dir / "model.safetensors")
    with contextlib.ExitStack() as stack:

        def servers(**faults):
            return stack.enter_context(receivers(2, ranks=1, faults={1: faults["fault"]} if faults else None))

        dying, stopping, refusing = (servers(fault=(what, 2)) for what in ("dies", "stops", "refuses"))
        others = [servers() for _ in range(6)]
        cases = [
            to(dying, 4),
            to(stopping, 4, timeout_s=3.0),
            to(refusing, 4),
            to(others[0], 4, "version", 2),
            to(others[1], 4, "twice", 3),
            to(others[2], 4, "dropped", 1),
            to(others[3], 4, "broken", 3),
            to(others[4], 4, "broken", 0),
            to(others[5], 4),
        ]
        found = run(tiny_model_dir, {"ranks": 4, "pipeline": 2, "expert": 2}, cases)
        errors = [[error for _, error in answers] for answers in found]
        for error in errors[0]:
            assert error.startswith(f"WeightTransferError: weight transfer to {dying[1].url} failed"), error
        for error in errors[1]:
            assert error.startswith("WeightTransferError: ")
            assert stopping[0].url not in error
            assert re.search(rf"{stopping[1].url}\S* did not (answer|take a bucket of \d+ bytes) in 3 s", error), error
        for error in errors[2]:
            assert f"{refusing[1].url}/update_weights_from_distributed answered 200: no room" in error
        assert set(errors[3]) == {
            "WeightCheckError: trainer rank 2 sends weights of version 5, and rank 0 of version 4"
        }
        assert all(e.startswith("WeightCheckError: trainer ranks") and e.endswith(EMBEDDING) for e in errors[4])
        assert "WeightCheckError: no trainer rank sends model." in errors[5][0]  # the others had sent all they had
        assert errors[6][3] == "RuntimeError: out of memory"
        assert all("trainer rank 3: " in e and "out of memory" in e for e in errors[6][:3])
        assert errors[7] == [
            "RuntimeError: out of memory",
            *["WeightCheckError: trainer rank 0: RuntimeError: out of memory"] * 3,
        ]
        assert errors[8] == [""] * 4
        whole(others[5], original)
