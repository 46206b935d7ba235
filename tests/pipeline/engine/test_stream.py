"""Samples that are asked for at one moment share an HTTP request; each is answered, refused and given up by itself."""

from __future__ import annotations

import asyncio
import json

import pytest

from pipeline.engine.sampling import Piece
from pipeline.engine.server import ServerError
from pipeline.engine.stream import RequestStream


class Server:
    """Answers an HTTP request in pieces of seven bytes, the samples of a request in reverse order."""

    def __init__(self, bad=()):
        self.posted, self.ended, self.bad, self.gate = [], [], bad, {}

    async def post(self, body):
        self.posted.append(body["rid"])
        if any(rid in self.bad for rid in body["rid"]):
            text = b"data: " + json.dumps({"error": {"code": 400, "message": "too long"}}).encode() + b"\n\n"
            yield text
            return
        samples = zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True)
        for rid, ids, parameters in reversed(list(samples)):
            if rid in self.gate:
                await self.gate[rid].wait()
            for reason in (None, None, {"type": "stop"}):
                meta = {"id": rid, "finish_reason": reason, "p": parameters, "output_token_logprobs": [[-1.0, *ids]]}
                line = {"output_ids": ids, "meta_info": meta}
                text = b"data: " + json.dumps(line).encode() + b"\n\n"
                for start in range(0, len(text), 7):
                    yield text[start : start + 7]
        yield b"data: [DONE]\n\n"

    async def end(self, rid):
        self.ended.append(rid)


def body(rid, start=0):
    return {
        "rid": rid,
        "input_ids": [len(rid)],
        "sampling_params": {"seed": rid},
        "extra_key": "k",
        "routed_experts_start_len": start,
    }


def run(server, work, gather_s=0.0):
    async def inside():
        stream = RequestStream(server.post, server.end, gather_s)
        try:
            return await work(stream)
        finally:
            await stream.close()

    return asyncio.run(inside())


def test_each_sample_gets_its_own_answer_out_of_one_request():
    async def work(stream):
        return await asyncio.gather(*(stream.ask(body(rid)) for rid in ("a", "bb", "ccc")))

    server = Server()
    answers = run(server, work)
    assert server.posted == [["a", "bb", "ccc"]]
    assert [answer["output_ids"] for answer in answers] == [[1] * 3, [2] * 3, [3] * 3]
    assert [answer["meta_info"]["output_token_logprobs"] for answer in answers] == [[[-1.0, n]] * 3 for n in (1, 2, 3)]
    parameters = [answer["meta_info"]["p"] for answer in answers]
    assert [sampling["seed"] for sampling in parameters] == ["a", "bb", "ccc"]
    assert all(sampling["stream_interval"] >= 200 for sampling in parameters), "a chunk a token costs more than tokens"


def test_whoever_asks_hears_of_tokens_before_the_answer_ends():
    async def work(stream):
        heard = []
        await stream.ask(body("a"), heard.append)
        return heard

    at = [Piece(1, (1,), (-1.0,)), Piece(2, (1,), (-1.0,)), Piece(3, (1,), (-1.0,), ended=True)]
    assert run(Server(), work) == at


def test_samples_whose_routes_begin_elsewhere_or_that_come_later_have_their_own_request():
    async def work(stream):
        await asyncio.gather(stream.ask(body("a")), stream.ask(body("b", start=3)), stream.ask(body("c")))
        await stream.ask(body("d"))

    server = Server()
    run(server, work)
    assert server.posted == [["a", "c"], ["b"], ["d"]]


def test_a_sample_ends_when_it_ends_not_with_the_longest_of_its_request():
    async def work(stream):
        server.gate["a"] = asyncio.Event()
        first, last = asyncio.ensure_future(stream.ask(body("a"))), asyncio.ensure_future(stream.ask(body("b")))
        assert (await asyncio.wait_for(last, 5))["meta_info"]["id"] == "b"
        assert not first.done()
        server.gate["a"].set()
        await first

    server = Server()
    run(server, work)


def test_only_the_sample_that_is_refused_fails():
    async def work(stream):
        return await asyncio.gather(*(stream.ask(body(rid)) for rid in "abc"), return_exceptions=True)

    a, b, c = run(Server(bad="b"), work)
    assert a["meta_info"]["id"] == "a"
    assert c["meta_info"]["id"] == "c"
    assert isinstance(b, ServerError)
    assert str(b) == "/generate answered 400: too long"


def test_a_sample_that_is_given_up_is_aborted_and_the_others_go_on():
    async def work(stream):
        server.gate |= {rid: asyncio.Event() for rid in "ab"}
        a, b = (asyncio.ensure_future(stream.ask(body(rid))) for rid in "ab")
        await asyncio.sleep(0.01)
        b.cancel()
        await asyncio.sleep(0.01)
        assert server.ended == ["b"]
        for gate in server.gate.values():
            gate.set()
        await a
        with pytest.raises(asyncio.CancelledError):
            await b

    server = Server()
    run(server, work)


def test_a_sample_that_is_given_up_before_it_is_sent_costs_no_request():
    async def work(stream):
        a, b = (asyncio.ensure_future(stream.ask(body(rid))) for rid in "ab")
        await asyncio.sleep(0)
        b.cancel()
        await a

    server = Server()
    run(server, work)
    assert server.posted == [["a"]]


def test_a_stream_that_ends_early_fails_what_is_open():
    async def cut(body):
        yield b'data: {"output_ids": [1], "meta_info": {"id": "a", "finish_reason": {"type": "stop"}}}\n\ndata: {"x'

    async def work(stream):
        return await asyncio.gather(stream.ask(body("a")), stream.ask(body("b")), return_exceptions=True)

    server = Server()
    server.post = cut
    a, b = run(server, work)
    assert a["output_ids"] == [1]
    assert isinstance(b, ServerError)


def test_what_is_no_json_fails_what_is_open():
    async def garbled(body):
        yield b"data: {nothing\n\n"

    async def work(stream):
        return await asyncio.gather(stream.ask(body("a")), return_exceptions=True)

    server = Server()
    server.post = garbled
    (error,) = run(server, work)
    assert isinstance(error, ServerError)
    assert "no JSON" in str(error)


def test_samples_that_come_one_by_one_share_a_request_where_it_waits_for_them():
    async def work(stream):
        async def later(rid, turns):
            for _ in range(turns):
                await asyncio.sleep(0)
            return await stream.ask(body(rid))

        return await asyncio.gather(later("a", 0), later("bb", 5))

    for gather_s, posted in ((0.0, [["a"], ["bb"]]), (0.05, [["a", "bb"]])):
        server = Server()
        run(server, work, gather_s)
        assert server.posted == posted


def test_a_mistake_of_who_hears_reaches_who_asked():
    def mistake(_):
        raise RuntimeError("a mistake")

    async def work(stream):
        return await asyncio.wait_for(stream.ask(body("a"), mistake), 5)

    with pytest.raises(RuntimeError, match="a mistake"):
        run(Server(), work)
