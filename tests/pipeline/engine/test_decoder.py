"""What a client asks of a server, and what it makes of answers and of wrong ones; no server is behind it."""

from __future__ import annotations

import asyncio
import base64
import copy

import numpy as np
import pytest

from pipeline.engine.client import AbortedError, SGLangClient
from pipeline.engine.control import UnreachableError, cache_key
from pipeline.engine.decoder import AnswerError, Decoder
from pipeline.engine.sampling import Sampling
from pipeline.rollout.session import Session

VOCABULARY, LAYERS, TOPK, EXPERTS = 32, 2, 2, 8
SAMPLING = Sampling(max_new_tokens=3, temperature=1.0)


def encoded(routes):
    return base64.b64encode(np.ascontiguousarray(routes).tobytes()).decode()


def routes_of(rows, dtype=np.uint8):
    return np.tile(np.array([0, 1], dtype), (rows, LAYERS, 1))


def answer_of(ids=(5, 6, 7), reason="length", rows=4, **meta):
    """Of a prompt of two tokens."""
    return {
        "output_ids": list(ids),
        "meta_info": {
            "finish_reason": {"type": reason},
            "num_retractions": 0,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "routed_experts": encoded(routes_of(rows)),
            "weight_versions": [{"version": "4", "start": 0, "end": len(ids)}],
        }
        | meta,
    }


def asked(answer, sampling=SAMPLING, *, ids=(1, 2), score=False, **settings):
    """What `sample` or `score` returns for this answer, the request that it made, and the client."""
    client = SGLangClient(
        "http://nowhere", vocab_size=VOCABULARY, num_layers=LAYERS, topk=TOPK, num_experts=EXPERTS, **settings
    )
    client.version = 4
    bodies = []

    async def run():
        async with client:

            async def ask(body, *_):
                bodies.append(body)
                return copy.deepcopy(answer)

            client._requests.ask = ask
            return await (client.score(ids) if score else client.sample(ids, sampling, routes_from=0))

    return asyncio.run(run()), bodies[0], client


def test_an_answer_becomes_tokens_with_all_that_belongs_to_them():
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}]
    part, body, _ = asked(answer_of(num_retractions=2, weight_versions=spans))
    assert part.ids.tolist() == [5, 6, 7]
    assert part.logprobs.tolist() == [-0.5] * 3
    assert part.weight_versions.tolist() == [3, 3, 4]
    assert (part.routes.shape, part.routes.dtype) == ((4, LAYERS, TOPK), np.uint8)
    assert (part.finish_reason, part.retractions) == ("length", 2)
    assert (body["input_ids"], body["routed_experts_start_len"]) == ([1, 2], 0)


def test_every_request_keeps_to_the_prefixes_of_its_own_weights():
    _, sampled, _ = asked(answer_of())
    pairs = [[None, 1, None], [-0.25, 2, None]]
    scored = {"meta_info": {"finish_reason": {"type": "length"}, "input_token_logprobs": pairs}}
    scored["meta_info"]["routed_experts"] = encoded(routes_of(1))
    (logprobs, _), body, _ = asked(scored, score=True)
    assert logprobs.tolist() == [-0.25]
    assert sampled["extra_key"] == body["extra_key"] == cache_key(4) != cache_key(3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answer_of(reason="tired"), "unknown finish reason"),
        (answer_of(finish_reason={"type": "abort", "status_code": 503}), "the server gave the request up"),
        (answer_of((5, 6), rows=3), "an answer was cut at 2 of 3 tokens: the server has no room"),
        (answer_of((5, 6, 7, 8), "stop", rows=5), "4 tokens for a limit of 3"),
        (answer_of((), "stop", rows=1), "0 tokens for a limit of 3"),
        (answer_of(output_token_logprobs=[[-1.0, t, None] for t in (5, 7, 6)]), "3 log-probs do not belong"),
        (answer_of(output_token_logprobs=[[-1.0, 5, None]]), "1 log-probs do not belong to the 3 tokens"),
        (answer_of((5, 6, VOCABULARY)), "token 32 is outside the model's vocabulary of 32"),
        (answer_of(weight_versions=[{"version": "4", "start": 0, "end": 2}]), "do not cover 3 tokens"),
        (answer_of(routed_experts=None), "no routes came back"),
        (answer_of(rows=3), "bytes of expert ids came back for routes of shape"),
        (answer_of(routed_experts=encoded(routes_of(4, np.int32) + 256)), "expert ids 256 .. 257 are outside"),
        (answer_of(routed_experts=encoded(routes_of(4) * 0)), "names expert 0 twice"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error(answer, words):
    with pytest.raises(AnswerError, match=words):
        asked(answer)


def test_a_row_of_minus_one_is_a_missing_row_and_is_kept_as_one():
    routes = routes_of(4, np.int32)
    routes[2, 1] = -1
    part, *_ = asked(answer_of(routed_experts=encoded(routes)))
    assert part.routes.dtype == np.int16
    assert np.array_equal(part.routes, routes)
    routes[2, 0, 0] = -1
    with pytest.raises(AnswerError, match=r"has -1 among its experts .*a missing row is -1 in all places"):
        asked(answer_of(routed_experts=encoded(routes)))


@pytest.mark.parametrize(("dtype", "wide"), [(np.uint8, 0), (np.int16, 0), (np.int32, 1)])
def test_routes_of_any_width_are_narrowed_and_wide_ones_counted(dtype, wide):
    part, _, client = asked(answer_of(routed_experts=encoded(routes_of(4, dtype))))
    assert part.routes.dtype == np.uint8
    assert client.decoder.wide_routes == wide


def test_a_request_that_was_aborted_before_it_ran_brings_nothing_and_one_that_ran_what_it_has():
    waited = answer_of((), "abort", rows=1)
    del waited["meta_info"]["num_retractions"]
    part, *_ = asked(waited)
    assert (len(part.ids), part.routes.shape, part.finish_reason) == (0, (0, LAYERS, TOPK), "abort")
    part, *_ = asked(answer_of((5,), "abort", rows=2))
    assert (part.ids.tolist(), part.finish_reason) == ([5], "abort")


@pytest.mark.parametrize(
    ("stops", "ignore_eos", "reason"), [((5,), False, "abort"), ((6,), False, "stop"), ((6,), True, "abort")]
)
def test_an_abort_that_came_with_a_stop_token_is_the_end_of_the_answer(stops, ignore_eos, reason):
    sampling = Sampling(max_new_tokens=3, temperature=1.0, stop_token_ids=stops, ignore_eos=ignore_eos)
    part, *_ = asked(answer_of((5, 6), "abort", rows=3), sampling)
    assert (part.ids.tolist(), part.finish_reason) == ([5, 6], reason)


def test_a_score_that_was_aborted_or_is_of_other_tokens_is_an_error():
    aborted = {"meta_info": {"finish_reason": {"type": "abort"}}}
    with pytest.raises(AbortedError):
        asked(aborted, score=True)
    pairs = [[None, 1, None], [-0.25, 3, None]]
    other = {"meta_info": {"finish_reason": {"type": "length"}, "input_token_logprobs": pairs}}
    with pytest.raises(AnswerError, match=r"log-probs of tokens \[1, 3\] came back for \[1, 2\]"):
        asked(other, score=True)


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_server_may_take_as_long_as_it_gets_on(gets_on):
    client = SGLangClient("http://nowhere", vocab_size=9, num_layers=1, topk=1, num_experts=1, routes=False)
    client.timeout_s, looks = 0.005, []

    async def run():
        answered = asyncio.get_running_loop().create_future()

        async def ask(body, *_):
            return await answered

        async def progress():
            looks.append(len(looks) if gets_on else 0)
            if len(looks) == 5:
                answered.set_result({"done": True})
            return looks[-1]

        async with client:
            client._requests.ask, client._progress = ask, progress
            return await client._answer({})

    if gets_on:
        assert asyncio.run(run()) == {"done": True}
    else:
        with pytest.raises(UnreachableError, match="did not get on"):
            asyncio.run(run())
        assert len(looks) == 2


def of_four_layers(*, routes):
    return Decoder(vocab_size=512, num_layers=4, topk=2, num_experts=8, moe_layers=range(4), routes=routes)


def test_a_layer_whose_routes_the_server_did_not_capture_is_an_error_that_names_it():
    """Zeros, as an engine leaves them where a kernel chose the experts itself; no backend here does."""
    routes = np.stack([np.tile([0, 1], (5, 1)), np.zeros((5, 2)), *[np.tile([2, 3], (5, 1))] * 2], 1).astype(np.int32)
    meta = {
        "finish_reason": {"type": "length"},
        "num_retractions": 0,
        "output_token_logprobs": [[-1.0, 7, None]] * 3,
        "routed_experts": base64.b64encode(routes.tobytes()).decode(),
        "weight_versions": [{"version": "0", "start": 0, "end": 3}],
    }
    with pytest.raises(AnswerError, match=r"layer 1 names expert 0 twice.*set replay=none or r2"):
        of_four_layers(routes=True).sampled({"meta_info": meta, "output_ids": [7] * 3}, Sampling(3, 1.0), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_token_sampling_mask": None}, "None kept sets for 2 tokens"),
        ({"output_token_sampling_mask": [[5]]}, "1 kept sets for 2 tokens"),
        ({"output_token_sampling_mask": [[5], [6, 9999]]}, "outside the model's vocabulary"),
        ({"output_token_sampling_mask": [[5], [7]]}, "is not among those that were kept"),
        ({"output_token_sampling_mask": [[5, 5], [6]]}, "is not among those that were kept"),
    ],
)
def test_kept_tokens_that_cannot_be_are_refused(changes, message):
    meta = {
        "id": "r",
        "finish_reason": {"type": "length"},
        "num_retractions": 0,
        "output_token_logprobs": [[-1.0, 5, None], [-1.0, 6, None]],
        "output_token_sampling_mask": [[5], [6]],
        "output_token_sampling_logprobs": [0.0, 0.0],
        "weight_versions": [{"version": "0", "start": 0, "end": 2}],
    } | changes

    def decode():
        part = of_four_layers(routes=False).sampled(
            {"meta_info": meta, "output_ids": [5, 6]}, Sampling(2, 1.0, return_kept=True), 0
        )
        Session(
            SGLangClient("http://nowhere", vocab_size=512, num_layers=4, topk=2, num_experts=8, routes=False), [1]
        )._take(part)

    with pytest.raises(AnswerError, match=message):
        decode()
