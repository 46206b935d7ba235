"""Of requests with one prompt one reads it, on a real server; which wait, and where, for a queue that is made up."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.server import ServerConfig
from pipeline.engine.inside import shared_prompts
from pipeline.engine.inside.shared_prompts import WORTH, held_back, one_reads
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import SGLangServer
from tests.conftest import client_of
from tests.support.sampling import answers

PROMPT, SAMPLES, ANSWER = 100, 8, 6
BATCH = re.compile(r"Prefill batch, #new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_of_many_samples_is_computed_once_and_all_have_its_routes(tiny_model_dir, tmp_path, overlap):
    config = ServerConfig(context_length=512, max_total_tokens=8192, prefix_cache=True, overlap_schedule=overlap)
    draw = np.random.default_rng(0)
    head = draw.integers(3, 60, PROMPT // 2)  # as of a chat template
    prompts = [np.concatenate([head, draw.integers(3, 60, PROMPT - len(head))]) for _ in range(3)]

    async def all_at_once(client):
        sampling = Sampling(ANSWER, 1.0, ignore_eos=True)
        return await asyncio.gather(*(answers(client, prompt, SAMPLES, sampling) for prompt in prompts))

    with SGLangServer(config, tiny_model_dir, tmp_path / "log", device="cpu", seed=0, return_routed_experts=True) as it:
        groups = asyncio.run(all_at_once(client_of(it, timeout_s=60)))
    batches = [tuple(map(int, found)) for found in BATCH.findall((tmp_path / "log").read_text())]
    asked = [
        batch for batch in batches if batch[1] + batch[2] >= PROMPT
    ]  # not what the server asks itself as it starts
    once = len(head) + 3 * (PROMPT - len(head))
    assert (
        once + 3 * (SAMPLES - 1) <= sum(new for _, new, _ in asked) < 1.1 * (once + 3 * SAMPLES)
    )  # they may share more
    assert sum(count for count, _, _ in asked) == 3 * SAMPLES
    for group in groups:
        assert len({len(rollout.token_ids) for rollout in group}) == 1
        assert all((rollout.routes[:PROMPT] == group[0].routes[:PROMPT]).all() for rollout in group)


class Cache:
    """Holds so many tokens of every prompt."""

    disable = False

    def __init__(self, tokens=0):
        self.tokens = tokens


@pytest.fixture(autouse=True)
def cached(monkeypatch):
    monkeypatch.setattr(
        shared_prompts, "_cached", lambda request, tree: min(tree.tokens, len(request.origin_input_ids))
    )


def request(prompt, said=(), *, key="weights 1", length=WORTH, finished=False):
    return SimpleNamespace(
        origin_input_ids=[prompt] * length, output_ids=list(said), extra_key=key, cache_salt=None, lora_id=None,
        finished=lambda: finished, kv=SimpleNamespace(cache_protected_len=0),
    )  # fmt: skip


def scheduler(*waiting, last=None, chunked=None, cached=0):
    return SimpleNamespace(
        waiting_queue=list(waiting), last_batch=None if last is None else SimpleNamespace(reqs=last),
        chunked_req=chunked, tree_cache=Cache(cached), enable_priority_preemption=False, is_hybrid_swa=False,
        running_batch=SimpleNamespace(batch_is_full=False, is_empty=lambda: False),
    )  # fmt: skip


def taking(count, more=()):
    """As SGLang: takes so many of those that it sees out of the queue, and may put others behind."""

    def take(it, *args, **kwargs):
        seen = list(it.waiting_queue)
        it.waiting_queue = [*seen[count:], *more]
        return seen[:count]

    return take


def test_all_but_the_first_wait_and_keep_their_places():
    a, b = [request(1) for _ in range(3)], [request(2) for _ in range(2)]
    new = request(3)
    it = scheduler(a[0], b[0], a[1], a[2], b[1])
    assert one_reads(taking(2, [new]), it) == [a[0], b[0]]
    assert it.waiting_queue == [a[1], a[2], b[1], new]


def test_those_whose_prompt_is_being_read_wait_on_and_go_together_when_it_is():
    first, *others = [request(1) for _ in range(4)]
    it = scheduler(first, *others)
    assert one_reads(taking(9), it) == [first]
    it.last_batch = SimpleNamespace(reqs=[first])  # its answer has not been looked at
    assert one_reads(taking(9), it) == []
    first.output_ids.append(5)
    assert one_reads(taking(9), it) == others


def test_a_cache_that_does_not_find_the_prompt_makes_nobody_wait_twice():
    it = scheduler(*[request(1) for _ in range(4)])
    assert len(one_reads(taking(9), it)) == 1
    assert len(one_reads(taking(9), it)) == 3


def test_prompts_that_begin_alike_are_read_from_where_they_part_by_one_each():
    """A template, two questions that begin alike and one that does not, two samples of each."""
    it = scheduler(*[request(1) for _ in range(6)])
    asked = it.waiting_queue
    for one, ids in zip(asked, ([1, 1, 2, 2, 8], [1, 1, 2, 3, 8], [1, 1, 4, 4, 8]) * 2, strict=True):
        one.origin_input_ids = ids
    assert one_reads(taking(9), it) == asked[:1]
    it.tree_cache.tokens = 2  # as of the others; of the first one's second sample it is 4
    assert one_reads(taking(9), it) == [asked[1], asked[2]]
    it.tree_cache.tokens = 4
    assert one_reads(taking(9), it) == [asked[3], asked[4], asked[5]]
    assert it.waiting_queue == []


def test_those_who_waited_for_older_weights_wait_again():
    first, *others = [request(1) for _ in range(4)]
    it = scheduler(first, *others)
    assert one_reads(taking(9), it) == [first]
    for one in others:
        one.extra_key = "weights 2"
    assert one_reads(taking(9), it) == others[:1]


def test_where_nobody_is_taken_in_nobody_is_looked_at():
    it = scheduler(request(1), request(1))
    it.running_batch.batch_is_full = True
    assert len(one_reads(taking(9), it)) == 2
    it.chunked_req = request(2)
    it.waiting_queue = [request(1), request(1)]
    assert len(one_reads(taking(9), it)) == 1


def test_a_long_prompt_that_is_read_in_parts_is_waited_for():
    reading, other = request(1), request(1)
    assert held_back(scheduler(other, chunked=reading)) == [other]


@pytest.mark.parametrize(
    "last",
    [[request(1, finished=True)], [request(1, said=[4])], [request(2)], None],
    ids=["it has ended", "it has read it", "it reads another", "none"],
)
def test_nobody_waits_for_one_that_is_not_reading_the_prompt(last):
    assert held_back(scheduler(request(1), last=last)) == []


def test_one_that_is_in_the_queue_again_does_not_wait_for_itself():
    retracted = request(1)
    assert held_back(scheduler(retracted, last=[retracted])) == []


def test_what_costs_nothing_waits_for_nothing():
    short = [request(1, length=WORTH - 1) for _ in range(3)]
    assert held_back(scheduler(*short)) == []
    known = [request(1, length=4 * WORTH) for _ in range(3)]
    assert held_back(scheduler(*known, cached=4 * WORTH - 1)) == []
    assert held_back(scheduler(request(1), request(1, key="weights 2"))) == []
    assert held_back(scheduler(request(1), request(1, said=[7]))) == []


def test_without_a_prefix_cache_nothing_is_held():
    it = scheduler(request(1), request(1))
    it.tree_cache.disable = True
    assert len(one_reads(taking(9), it)) == 2


def test_the_queue_is_whole_again_after_an_error():
    it = scheduler(*[request(1) for _ in range(3)])
    before = list(it.waiting_queue)

    def fail(it):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        one_reads(fail, it)
    assert it.waiting_queue == before
