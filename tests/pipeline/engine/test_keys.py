"""Who may do what on a run's server: each key opens its own endpoints, and nobody is told a key."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from pipeline import http
from pipeline.config.server import ServerConfig
from pipeline.engine.client import SGLangClient
from pipeline.engine.control import ServerAddress, SGLangControl
from pipeline.engine.keys import ServerKeys
from pipeline.engine.processes import TOKEN_VARIABLE, processes_of
from pipeline.engine.sampling import Sampling
from pipeline.engine.server import ServerError
from tests.support.sampling import answers

API = [
    ("POST", "/generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}}),
    ("GET", "/server_info", None),
    ("GET", "/model_info", None),
]
ADMIN = [
    ("POST", "/flush_cache", {}),
    ("POST", "/weights_checker", {"action": "checksum"}),
    ("POST", "/freeze_gc", {}),
    ("POST", "/abort_request", {"rid": "nobody's"}),
    ("POST", "/continue_generation", {}),
]
CHANGING = [
    ("POST", "/pause_generation", {"mode": "in_place"}),
    ("POST", "/begin_weight_update", {}),
    ("POST", "/end_weight_update", {}),
    ("POST", "/update_weight_version", {"new_version": "99"}),
    ("POST", "/init_weights_update_group", {}),
    ("POST", "/destroy_weights_update_group", {}),
    ("POST", "/update_weights_from_distributed", {}),
    ("POST", "/update_weights_from_tensor", {}),
    ("POST", "/update_weights_from_disk", {"model_path": "/nowhere"}),
    ("POST", "/set_internal_state", {"server_args": {}}),
]
"""Asked only with keys that must not open them."""


def status(server, method, path, body, key):
    return http.request(method, server.url + path, body=body, key=key, timeout_s=60).status


def name(case):
    return case[1]


@pytest.mark.parametrize("case", [*API, *ADMIN, *CHANGING], ids=name)
def test_nothing_answers_without_a_key_or_with_another_runs(server, case):
    assert status(server, *case, None) == 401
    assert status(server, *case, ServerKeys.random().of_path(case[1])) == 401


@pytest.mark.parametrize("case", API, ids=name)
def test_the_admin_key_does_not_sample_and_the_api_key_does(server, case):
    assert status(server, *case, server.keys.admin) == 401
    assert status(server, *case, server.keys.api) == 200


@pytest.mark.parametrize("case", [*ADMIN, *CHANGING], ids=name)
def test_the_api_key_changes_nothing(server, case):
    assert status(server, *case, server.keys.api) == 401


@pytest.mark.parametrize("case", ADMIN, ids=name)
def test_the_admin_key_steers(server, case):
    assert status(server, *case, server.keys.admin) == 200


@pytest.mark.parametrize("path", ["/ready", "/health"])
def test_whether_a_server_is_there_may_be_asked_by_all(server, path):
    assert status(server, "GET", path, None, None) == 200


def test_a_client_with_the_pair_samples_pauses_aborts_and_asks_for_weights(client):
    rollouts = asyncio.run(answers(client, [1, 2, 3], 2, Sampling(4, 1.0, ignore_eos=True)))
    assert [len(rollout.response_ids) for rollout in rollouts] == [4, 4]
    client.pause("in_place")
    assert not client.healthy()
    client.resume()
    assert client.healthy()
    client.abort()
    client.flush_cache()
    assert client.held_weights([])[0].parameters
    assert client.weight_version() == 0


def test_a_client_without_keys_says_what_it_was_answered(server, client):
    bare = SGLangClient(server.url, vocab_size=512, num_layers=4, topk=2, num_experts=8, log_path=server.log_path)

    async def run():
        async with bare:
            await bare.sample([1], Sampling(1, 1.0))

    with pytest.raises(ServerError, match=r"/generate answered 401: .*Unauthorized.*sglang\.log"):
        asyncio.run(run())
    with pytest.raises(ServerError, match=r"/pause_generation answered 401: .*Unauthorized"):
        SGLangControl(server.url).pause()


def test_no_process_log_answer_or_repr_shows_a_key(server, client):
    processes = processes_of(psutil.Process(server.pid).environ()[TOKEN_VARIABLE])
    shown = {"log": server.log_path.read_bytes(), "server_info": repr(client.server_info()).encode()}
    for process in processes:
        for file in ("cmdline", "environ"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
                shown[f"{process.pid} {file}"] = Path(f"/proc/{process.pid}/{file}").read_bytes()
    shown["repr"] = repr([server.keys, ServerAddress(server.url, server.log_path, server.keys)]).encode()
    assert len(shown) >= 3 + 2 * 3  # of three processes at least
    assert "'api_key': '***'" in shown["server_info"].decode()
    assert b"api_key" in shown["log"]
    for key in (server.keys.api, server.keys.admin):
        assert [where for where, text in shown.items() if key.encode() in text] == []


def test_a_pair_goes_through_a_pipe_as_it_is_and_no_two_pairs_are_the_same():
    keys = ServerKeys.random()
    assert ServerKeys.from_bytes(keys.to_bytes()) == keys
    assert len({keys.api, keys.admin, ServerKeys.random().api, ServerKeys.random().admin}) == 4
    assert min(len(keys.api), len(keys.admin)) >= 43
    with pytest.raises(ValueError, match="Expecting value"):
        ServerKeys.from_bytes(b"")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", "mine"], "--api-key cannot be given: a run makes keys of its own"),
        (["--admin-api-key=mine"], "--admin-api-key cannot be given: a run makes keys of its own"),
        (["--max-total-tokens", "99", "--grpc-port=5"], "--grpc-port cannot be given: .*without asking for a key"),
        (["--tokenizer-worker-num", "2"], "--tokenizer-worker-num cannot be given: .*without asking for a key"),
    ],
)
def test_arguments_that_show_a_key_or_open_a_way_past_it_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ServerConfig(extra_args=arguments)
