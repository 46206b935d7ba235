"""New weights into a running server, by both transports: they arrive, they count, and what goes wrong is told."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.engine.control import ServerAddress
from pipeline.engine.sampling import Sampling
from pipeline.weights import FurtherSender, WeightsConfig, WeightSender, WeightTransferError
from pipeline.weights.servers import WeightCheckError
from tests.conftest import save_tiny_model
from tests.support import reference
from tests.support.sampling import answers

SEQUENCE = np.random.default_rng(0).integers(0, 500, 60)


def score(client):
    async def run():
        async with client:
            return (await client.score(SEQUENCE))[0]

    return asyncio.run(run())


def shared_memory() -> set[Path]:
    """Of this process; tests before may have left some."""
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def buckets(weights, tensors_per_bucket=20):
    items = list(weights.items())
    return [items[i : i + tensors_per_bucket] for i in range(0, len(items), tensors_per_bucket)]


def make_sender(url, keys=None, timeout_s=30.0, **settings):
    return WeightSender([ServerAddress(url, keys=keys)], WeightsConfig(timeout_s=timeout_s, **settings), device="cpu")


@pytest.fixture(params=["distributed", "shared_memory"])
def sender(server, request):
    sender = make_sender(server.url, server.keys, transport=request.param)
    sender.connect()
    yield sender
    sender.close()


@pytest.fixture
def original(tiny_model_dir, sender, client):
    """The weights the server started with; they are back when the test ends."""
    weights = load_file(tiny_model_dir / "model.safetensors")
    yield weights
    sender.send(buckets(weights), 0)
    assert client.weight_version() == 0


def test_a_transfer_gives_the_new_model_and_its_version_to_every_token(
    client, sender, original, tiny_model_dir, tmp_path
):
    before, new_dir = shared_memory(), save_tiny_model(tmp_path, seed=1)
    old, new = (reference.logprobs(reference.load(folder), SEQUENCE) for folder in (tiny_model_dir, new_dir))
    assert np.abs(old - new).max() > 0.1
    assert np.abs(score(client) - old).max() < 1e-5
    checksums = client.checksums()

    sender.send(buckets(load_file(new_dir / "model.safetensors")), 3)

    assert np.abs(score(client) - new).max() < 1e-5
    assert client.checksums() != checksums
    assert client.weight_version() == 3

    rollouts = asyncio.run(answers(client, [1, 2, 3], 2, Sampling(4, 1.0, ignore_eos=True)))
    assert all((rollout.weight_versions == 3).all() for rollout in rollouts)

    sender.send(buckets(original), 4)
    assert client.checksums() == checksums
    assert shared_memory() == before


def test_a_server_that_gave_its_memory_away_knows_nothing_until_it_has_weights_again(client, sender, original):
    sender.send(buckets(original), 1)
    checksums, scores = client.checksums(), score(client)

    async def with_requests_in_hand():
        async with client:
            asked = asyncio.create_task(client.sample(SEQUENCE[:8], Sampling(400, 1.0, ignore_eos=True)))
            while not (await client.current_loads())[0]["num_running_reqs"]:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(client.release_memory)
            return await asked

    cut = asyncio.run(with_requests_in_hand())
    assert cut.finish_reason == "abort"
    assert 0 < len(cut.ids) < 400
    assert client.checksums() != checksums
    client.resume_memory("weights")
    sender.send(buckets(original), 2)
    client.resume_memory("cache")
    assert client.checksums() == checksums
    assert np.array_equal(score(client), scores)


def test_the_size_of_the_buckets_does_not_matter(client, sender, original):
    doubled = {name: tensor * 2 for name, tensor in original.items()}
    sender.send(buckets(doubled, 1000), 5)
    one = client.checksums()
    sender.send(buckets(original), 6)
    assert client.checksums() != one
    sender.send(buckets(doubled, 7), 7)
    assert client.checksums() == one


def test_a_bucket_may_mix_dtypes(client, sender, original):
    """An odd count of bf16 before a float32 would leave the latter unaligned."""
    before = client.checksums()
    odd = ("model.layers.0.nonexistent.weight", torch.zeros(3, dtype=torch.bfloat16))
    norm = ("model.norm.weight", original["model.norm.weight"] * 2)
    sender.send([[odd, norm]], 8)  # a version that is not compared: the server ignores the first
    changed = [name for name, value in client.checksums()[0].items() if value != before[0][name]]
    assert changed == ["model.norm.weight"]


def test_two_senders_at_once_give_what_one_gives(client, server, sender, original):
    doubled = {name: tensor * 2 for name, tensor in original.items()}
    sender.send(buckets(doubled), 10)
    one = client.checksums()
    sender.send(buckets(original), 11)
    config, address = (
        WeightsConfig(timeout_s=30.0, transport="distributed"),
        ServerAddress(server.url, keys=server.keys),
    )
    names = list(doubled)
    # a share has more rounds of one bucket, the other buckets in more turns
    shares = [
        [[[(n, doubled[n])] for n in names[:3]], [[(n, doubled[n]) for n in names[3:30]]]],
        [[], [[(n, doubled[n]) for n in names[30:]]]],
    ]
    first = WeightSender([address], config, device="cpu", senders=(0, 1), names=frozenset(names))
    meeting = first.offer()
    assert meeting is not None
    second = FurtherSender(meeting, 1, config)

    def of_second():
        second.connect()
        second.send_rounds(shares[1], 21)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(of_second)
        first.connect()
        first.send_rounds(shares[0], 21)  # a version that is compared
        other.result()
    assert client.checksums() == one
    assert first.sent.nbytes + second.sent.nbytes == sum(t.nbytes for t in doubled.values())
    first.close()
    second.close()


def test_a_wrong_shape_is_an_error_that_names_server_and_reason(client, server, sender, original):
    with pytest.raises(WeightTransferError, match=rf"{server.url}.*(?s:.)*\[7\].*\[64\]"):
        sender.send([[("model.norm.weight", torch.zeros(7))]], 9)
    client.end_weight_update()


def test_a_server_that_refuses_is_noticed_at_once_not_after_the_time_out(server, client, tiny_model_dir):
    """It answers over HTTP and never joins the broadcast."""
    lonely = make_sender(server.url, server.keys, transport="distributed")
    lonely.connect()
    group = lonely.transport.group.name
    client.post("/destroy_weights_update_group", {"group_name": group})
    began = time.monotonic()
    with pytest.raises(WeightTransferError, match=server.url):
        lonely.send(buckets(load_file(tiny_model_dir / "model.safetensors")), 9)
    assert time.monotonic() - began < 10
    client.end_weight_update()


def test_a_server_that_is_not_there_fails_to_connect_in_time():
    began = time.monotonic()
    with pytest.raises(WeightTransferError, match=r"127\.0\.0\.1:9"):
        make_sender("http://127.0.0.1:9", timeout_s=5).connect()
    assert time.monotonic() - began < 10


def test_a_server_that_ends_before_it_says_what_it_holds_has_failed_the_transfer_and_not_the_comparison():
    """The fleet then sends to those that are up, where weights that arrived otherwise would end the run."""
    sender = make_sender("http://127.0.0.1:9", transport="distributed")
    with pytest.raises(WeightTransferError, match=r"127\.0\.0\.1:9") as raised:
        sender.differences([[("model.norm.weight", torch.zeros(7))]])
    assert not isinstance(raised.value, WeightCheckError)
