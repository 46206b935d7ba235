"""What comes back from a real SGLang server, against transformers, and what the client refuses."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time

import numpy as np
import pytest

from pipeline.engine.client import SGLangClient
from pipeline.engine.control import UnreachableError
from pipeline.engine.decoder import AnswerError
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from pipeline.rollout.sampler import sample_groups_sync
from pipeline.rollout.session import Session
from pipeline.types import Prompt, Rollout, Sampled
from tests.support import reference
from tests.support.sampling import answers, sampling_begins

FREE = Sampling(max_new_tokens=16, temperature=1.0, ignore_eos=True)
LONG = Sampling(max_new_tokens=900, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return reference.load(tiny_model_dir)


def random_prompts(count, lengths=(3, 24), seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(rng.integers(0, 500, rng.integers(*lengths)), "", index=i) for i in range(count)]


def generate(client, ids, n=1, sampling=FREE):
    return asyncio.run(answers(client, ids, n, sampling))


def score(client, ids):
    async def run():
        async with client:
            return await client.score(ids)

    return asyncio.run(run())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_sampled_tokens_equal_transformers(client, model, temperature):
    sampling = Sampling(max_new_tokens=16, temperature=temperature, ignore_eos=True)
    for group in sample_groups_sync(client, random_prompts(8), 4, sampling):
        for rollout in group.rollouts:
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            expected = reference.logprobs(model, ids, temperature)[len(rollout.prompt_ids) - 1 :]
            assert np.abs(rollout.rollout_logprobs - expected).max() < 1e-5


def test_routes_equal_transformers_except_at_ties(client, model):
    compared = 0
    for group in sample_groups_sync(client, random_prompts(8, seed=1), 4, FREE):
        for rollout in group.rollouts:
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            expected, gap = reference.routes(model, ids[:-1])
            assert rollout.routes.shape == expected.shape
            assert rollout.routes.dtype == np.uint8
            same = (np.sort(rollout.routes, -1) == np.sort(expected, -1)).all(-1)
            assert same[gap > 1e-4].all()
            compared += int((gap > 1e-4).sum())
    assert compared > 1000


def test_a_long_prompt_has_the_logprobs_of_transformers(client, model):
    """More queries than the compiled loop takes; torch computes them."""
    ids = np.random.default_rng(2).integers(0, 500, 400)
    logprobs, routes = score(client, ids)
    assert np.abs(logprobs - reference.logprobs(model, ids)).max() < 1e-5
    assert routes.shape == (399, 4, 2)


def test_score_of_an_answer_equals_what_sampling_it_returned(client):
    (rollout,) = generate(client, [5, 6, 7, 8])
    logprobs, routes = score(client, np.concatenate([rollout.prompt_ids, rollout.response_ids]))
    assert np.abs(logprobs[3:] - rollout.rollout_logprobs).max() < 1e-5
    assert (routes == rollout.routes).all()


@pytest.mark.parametrize("k", [0, 5])
def test_a_teacher_tells_of_an_answer_what_transformers_does_and_its_likeliest_tokens(client, model, k):
    ids = np.random.default_rng(3).integers(0, 511, 40)

    async def run():
        async with client:
            return await asyncio.gather(*(client.teach(ids, start, k) for start in (1, 30, 39)))

    table = reference.scores(model, ids)
    for start, told in zip((1, 30, 39), asyncio.run(run()), strict=True):
        own = table[start - 1 : -1]
        assert np.abs(told.logprobs - own[np.arange(len(own)), ids[start:]]).max() < 1e-5
        assert told.top_k == k
        if k:
            assert np.array_equal(np.sort(told.top_ids), np.sort(np.argsort(-own, 1)[:, :k]))
            assert np.abs(told.top_logprobs - np.take_along_axis(own, told.top_ids.astype(int), 1)).max() < 1e-5
            assert (np.diff(told.top_logprobs) <= 0).all()


def test_the_last_token_of_the_vocabulary_is_scored_like_any_other(client, model):
    """SGLang names it 0 in its answer, and computes its log-prob all the same."""
    ids = np.array([5, 511, 7, 511, 9])
    assert np.abs(score(client, ids)[0] - reference.logprobs(model, ids)).max() < 1e-5


def test_groups_come_back_in_the_order_of_the_prompts_and_are_announced_once(client):
    prompts, seen = random_prompts(12, seed=3), []
    groups = sample_groups_sync(client, prompts, 3, FREE, on_group=lambda i, group: seen.append((i, group)))
    assert [group.prompt.index for group in groups] == list(range(12))
    assert all((r.prompt_ids == group.prompt.ids).all() for group in groups for r in group.rollouts)
    assert sorted(i for i, _ in seen) == list(range(12))
    assert all(group is groups[i] for i, group in seen)


def test_samples_of_a_group_differ(client):
    different = {tuple(r.response_ids.tolist()) for r in generate(client, [1, 2, 3], n=8)}
    assert len(different) == 8


def test_greedy_samples_are_equal(client):
    greedy = generate(client, [1, 2, 3], n=4, sampling=Sampling(8, 0.0, ignore_eos=True))
    assert len({tuple(r.response_ids.tolist()) for r in greedy}) == 1


def test_an_answer_ends_with_its_stop_token(client):
    (greedy,) = generate(client, [9, 8, 7], sampling=Sampling(12, 0.0, ignore_eos=True))
    stop = int(greedy.response_ids[4])
    first = int(np.flatnonzero(greedy.response_ids == stop)[0])
    (stopped,) = generate(client, [9, 8, 7], sampling=Sampling(12, 0.0, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    assert (stopped.response_ids == greedy.response_ids[: first + 1]).all()
    assert greedy.finish_reason == "length"


async def aborted(client, sampling=LONG):
    """One request, aborted in the middle."""
    async with client:
        task = asyncio.create_task(client.sample([4, 5, 6], sampling))
        await sampling_begins(client)
        await asyncio.to_thread(client.abort)
        return await task


def test_an_aborted_request_returns_what_it_has(client):
    part = asyncio.run(aborted(client))
    assert part.finish_reason == "abort"
    assert 0 < len(part.ids) < 900
    assert len(part.routes) == 3 + len(part.ids) - 1


def test_a_request_that_is_aborted_in_the_queue_brings_nothing_and_a_session_samples_it_again(client):
    """The server runs 256 at a time; those behind them have not begun."""

    async def run():
        async with client:
            sessions = [Session(client, [4, 5, 6]) for _ in range(300)]
            tasks = [asyncio.create_task(s.sample(Sampling(30, 1.0, ignore_eos=True))) for s in sessions]
            while sum(load["num_waiting_reqs"] for load in await asyncio.to_thread(client.loads)) == 0:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(client.abort)
            return sessions, await asyncio.gather(*tasks)

    sessions, rollouts = asyncio.run(run())
    assert any(session.interruptions for session in sessions)
    assert all(len(rollout) == 30 and rollout.finish_reason == "length" for rollout in rollouts)


def extend(client, rollout, sampling):
    async def run():
        async with client:
            return await Session(client, rollout.prompt_ids, rollout=rollout).sample(sampling)

    return asyncio.run(run())


def test_a_rollout_cut_and_gone_on_with_is_the_whole_one(client):
    (whole,) = generate(client, [11, 12, 13], sampling=Sampling(24, 0.0, ignore_eos=True))
    (cut,) = generate(client, [11, 12, 13], sampling=Sampling(10, 0.0, ignore_eos=True))
    once = extend(client, cut, Sampling(1, 0.0, ignore_eos=True))
    twice = extend(client, once, Sampling(13, 0.0, ignore_eos=True))
    assert (twice.response_ids == whole.response_ids).all()
    assert np.abs(twice.rollout_logprobs - whole.rollout_logprobs).max() < 1e-5
    assert twice.routes.shape == (3 + 24 - 1, 4, 2)
    assert (twice.routes == whole.routes).all()
    assert (twice.prompt_ids == [11, 12, 13]).all()


def test_what_was_sampled_before_an_abort_keeps_its_routes_under_other_weights_versions(client):
    part = asyncio.run(aborted(client))
    first = Rollout.begun(np.array([4, 5, 6], np.int32), part)
    client.set_weight_version(3)
    try:
        whole = extend(client, first, Sampling(5, 1.0, ignore_eos=True))
    finally:
        client.set_weight_version(0)
    assert len(whole) == len(first) + 5
    assert (whole.routes[: len(first.routes)] == first.routes).all()
    assert len(whole.routes) == 3 + len(whole) - 1
    assert whole.weight_versions.tolist() == [0] * len(first) + [3] * 5


def test_a_client_whose_loop_stood_still_longer_than_sglang_keeps_connections_goes_on(client):
    async def run():
        async with client:
            await client.sample([1, 2, 3], FREE)
            time.sleep(6)
            return await client.sample([1, 2, 3], FREE)

    assert len(asyncio.run(run()).ids) == 16


def test_the_limit_of_time_is_on_the_progress_of_the_server_not_on_the_answer(client):
    client.timeout_s, begun = 1.5, time.monotonic()
    answers = generate(client, [1, 2, 3], n=8, sampling=Sampling(1000, 1.0, ignore_eos=True))
    assert [len(answer) for answer in answers] == [1000] * 8
    assert time.monotonic() - begun > 1.5 * client.timeout_s  # else nothing was shown


def test_a_server_that_does_not_get_on_is_given_up(client):
    client.timeout_s = 0.5
    client.pause("in_place")
    try:
        with pytest.raises(UnreachableError, match=r"did not get on for 0\.5 s.*sglang\.log"):
            generate(client, [1, 2, 3])
    finally:
        client.resume()


def test_routes_come_in_the_narrowest_type_and_what_does_not_is_counted(client):
    (rollout,) = generate(client, [1, 2, 3])
    assert rollout.routes.dtype == np.uint8
    assert client.decoder.wide_routes == 0
    for dtype, wide in ((np.uint8, 0), (np.int16, 0), (np.int32, 1)):
        sent = base64.b64encode(rollout.routes.astype(dtype).tobytes()).decode()
        decoded = client.decoder.decoded_routes({"routed_experts": sent}, len(rollout.routes))
        assert np.array_equal(decoded, rollout.routes)
        assert client.decoder.wide_routes == wide
    for bytes_ in (sent[:-8], base64.b64encode(rollout.routes.astype(np.int64).tobytes()).decode(), sent + sent):
        with pytest.raises(AnswerError, match=r"bytes of expert ids came back for routes of shape"):
            client.decoder.decoded_routes({"routed_experts": bytes_}, len(rollout.routes))


def test_a_continuation_that_does_not_follow_on_is_refused(client):
    (rollout,) = generate(client, [1, 2, 3])
    ids = np.array([5, 6], np.int32)
    two = Sampled(ids, np.zeros(2, np.float32), np.array([[[0, 1]] * 4] * 2, np.uint8), np.zeros(2, np.int32), "stop")
    assert len(rollout.extended(two)) == len(rollout) + 2
    with pytest.raises(ValueError, match="as many route rows, not 3"):
        rollout.extended(dataclasses.replace(two, routes=np.array([[[0, 1]] * 4] * 3, np.uint8)))
    with pytest.raises(ValueError, match="as many route rows, not None"):
        rollout.extended(dataclasses.replace(two, routes=None))
    with pytest.raises(ValueError, match="from kept tokens where its beginning was"):
        rollout.extended(dataclasses.replace(two, kept=ids[:, None]))


def test_tokens_carry_the_version_of_the_weights_that_sampled_them(client):
    async def run():
        async with client:
            task = asyncio.create_task(Session(client, [4, 5, 6]).sample(dataclasses.replace(LONG, max_new_tokens=400)))
            await sampling_begins(client)
            await asyncio.to_thread(client.pause, "in_place")
            await asyncio.to_thread(client.set_weight_version, 7)
            await asyncio.to_thread(client.resume)
            return await task

    try:
        rollout = asyncio.run(run())
        assert set(rollout.weight_versions.tolist()) == {0, 7}
        assert (np.diff(rollout.weight_versions) >= 0).all()
        assert client.weight_version() == 7
    finally:
        client.set_weight_version(0)
    assert (generate(client, [4, 5, 6])[0].weight_versions == 0).all()


@pytest.mark.parametrize("ids", [[1, 512], [-1, 3], [], [[1, 2]], [0.5, 1.0]])
def test_a_bad_prompt_is_refused_and_the_server_lives(client, ids):
    with pytest.raises(ValueError, match=r"vocabulary|token ids"):
        generate(client, ids)
    assert len(generate(client, [1, 2])[0]) == 16


def test_a_seed_is_refused_by_a_server_that_would_ignore_it(client):
    with pytest.raises(ValueError, match="deterministic"):
        generate(client, [1, 2], sampling=Sampling(4, 1.0, seed=1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"num_experts": 4}, "outside"), ({"topk": 3}, "shape"), ({"num_layers": 5}, "shape")],
)
def test_routes_that_do_not_fit_the_model_are_an_error(client, wrong, words):
    shape = {"vocab_size": 512, "num_layers": 4, "topk": 2, "num_experts": 8} | wrong
    with pytest.raises(AnswerError, match=words):
        generate(SGLangClient(client.url, **shape, keys=client.keys), [1, 2, 3], n=4)


def test_what_sglang_refuses_is_told_in_its_words(client):
    with pytest.raises(ServerError, match=r"400.*(?s:.)*temperature"):
        generate(client, [1, 2], sampling=Sampling(4, -1.0))


def test_a_server_that_is_not_there_is_an_error_that_names_the_log(tmp_path):
    gone = SGLangClient(
        "http://127.0.0.1:9", vocab_size=8, num_layers=1, topk=1, num_experts=1, log_path=tmp_path / "the.log"
    )
    with pytest.raises(ServerError, match=r"the\.log"):
        generate(gone, [1])
    with pytest.raises(ServerError, match=r"the\.log"):
        gone.flush_cache()
    assert not gone.healthy()


def test_the_first_failure_ends_all_groups(client):
    prompts = [Prompt(np.array([1, 2, 3]), ""), Prompt(np.array([1, 9999]), "")]
    began = time.monotonic()
    with pytest.raises(ValueError, match="vocabulary"):
        sample_groups_sync(client, prompts, 2, Sampling(900, 1.0, ignore_eos=True))
    assert time.monotonic() - began < 5


def test_pause_stops_and_resume_goes_on(client):
    client.pause("in_place")
    assert not client.healthy()
    client.resume()
    assert client.healthy()
    assert len(generate(client, [1, 2])[0]) == 16


def test_checksums_name_every_parameter_and_do_not_change_by_themselves(client):
    before = client.checksums()
    assert len(before) == 1
    assert "model.layers.3.mlp.experts.w13_weight" in before[0]
    generate(client, [1, 2])
    assert client.checksums() == before


def test_kept_tokens_and_logprobs_over_them_equal_transformers(client, model):
    sampling = Sampling(12, 0.3, top_k=10, top_p=0.6, min_p=0.05, return_kept=True, ignore_eos=True)
    widths = []
    for group in sample_groups_sync(client, random_prompts(4, seed=7), 3, sampling):
        for rollout in group.rollouts:
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            table = reference.scores(model, ids, 0.3)[len(rollout.prompt_ids) - 1 : -1]
            assert rollout.kept.dtype == np.int32
            for row, kept, token, logprob in zip(
                table, rollout.kept, rollout.response_ids, rollout.rollout_logprobs, strict=True
            ):
                kept = kept[kept >= 0]
                best = np.argsort(-row)[:10]
                chance = np.exp(row[best])
                # what top-p of the whole distribution and min-p leave of the ten
                expected = best[(np.cumsum(chance) - chance <= 0.6) & (chance >= 0.05 * chance[0])]
                assert set(kept) == set(expected)
                assert token in kept
                assert abs(logprob - (row[token] - np.log(np.exp(row[kept]).sum()))) < 1e-5
                widths.append(len(kept))
    assert 1 <= min(widths) < max(widths) <= 10


def test_a_continuation_brings_its_kept_tokens(client):
    sampling = Sampling(4, 1.0, top_k=5, top_p=0.5, return_kept=True, ignore_eos=True)
    (begun,) = generate(client, [1, 2, 3], 1, sampling)
    whole = extend(client, begun, sampling)
    assert len(whole.kept) == len(whole) == 8
    assert [set(row) - {-1} for row in whole.kept[:4]] == [set(row) - {-1} for row in begun.kept]
    assert all(token in row for token, row in zip(whole.response_ids, whole.kept, strict=True))


def test_without_being_asked_a_mask_leaves_logprobs_over_the_vocabulary(client, model):
    (rollout,) = generate(client, [1, 2, 3], 1, Sampling(8, 1.0, top_k=5, ignore_eos=True))
    expected = reference.logprobs(model, rollout.token_ids)[2:]
    assert rollout.kept is None
    assert np.abs(rollout.rollout_logprobs - expected).max() < 1e-5


def test_a_vocabulary_smaller_than_top_k_is_kept_whole(client, model):
    (rollout,) = generate(client, [1, 2, 3], 1, Sampling(4, 1.0, top_k=4096, return_kept=True, ignore_eos=True))
    assert rollout.kept.shape == (4, 512)
    assert np.abs(rollout.rollout_logprobs - reference.logprobs(model, rollout.token_ids)[2:]).max() < 1e-5


def test_min_p_with_a_seed_would_kill_the_scheduler_and_is_refused():
    with pytest.raises(ValueError, match="dies of min_p with a seed"):
        Sampling(4, 1.0, min_p=0.1, seed=0)
