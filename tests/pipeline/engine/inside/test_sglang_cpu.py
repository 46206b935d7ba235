"""The CPU backend computes what SGLang's own fallbacks compute, and samples what the probabilities say."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.engine.inside import plugin
from pipeline.engine.inside.cpu import kernels
from tests.support.preloaded_servers import run_module
from tests.support.vendor import lines

COMPARED = [
    "decode", "short prompts", "short prompts after a cached prefix", "a long prompt among short ones",
    "a long prompt after a cached prefix", "threads", "a window", "a window of many tokens", "sinks",
    "a window and sinks", "latents", "norms", "rotation", "rotation alone", "storing",
    "large experts", "large experts in the library's order", "experts", "experts when all tokens choose the same",
    "experts of many rows and of few", "largest of a softmax",
    "experts of several ranks", "large experts of several ranks", "biased experts of several ranks", "routers",
]  # fmt: skip


@pytest.fixture(scope="module")
def differences(preloaded, tmp_path_factory):
    output = tmp_path_factory.mktemp("against_sglang") / "output"
    code = run_module("tests.support.against_sglang", output)
    said = output.read_text()
    assert code == 0, said[-3000:]
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))


@pytest.mark.parametrize("what", COMPARED)
def test_the_batched_backend_equals_torch_native(differences, what):
    assert differences[what] < 1e-5


def test_every_comparison_is_looked_at(differences):
    assert sorted(differences) == sorted(COMPARED)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    probabilities = np.array([0.5, 0.0, 0.2, 0.3, 0.0], np.float32)
    rows = 40_000
    tokens = np.empty(rows, np.int32)
    kernels.sample_rows(np.tile(probabilities, (rows, 1)), np.random.default_rng(0).random(rows), tokens)
    frequencies = np.bincount(tokens, minlength=5) / rows
    assert np.abs(frequencies - probabilities).max() < 0.01  # four standard deviations
    assert frequencies[1] == frequencies[4] == 0


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.26, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform, token):
    weights = np.array([[0.0, 1.0, 0.0, 3.0, 0.0]], np.float32)  # need not sum to one
    tokens = np.empty(1, np.int32)
    kernels.sample_rows(weights, np.array([uniform]), tokens)
    assert tokens[0] == token


def test_the_plugin_does_nothing_for_a_server_on_a_gpu(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    before = dict(sys.modules)
    plugin.activate()
    assert dict(sys.modules) == before


def test_the_plugin_imports_light():
    """It is loaded by every SGLang process, on GPUs too."""
    heavy = "[name for name in ('torch', 'sglang', 'numba') if name in sys.modules]"
    code = f"import sys, pipeline.engine.inside.plugin; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("file", "line", "begins"),
    [
        ("layers/moe/token_dispatcher/standard.py", 94, "def _map_topk_ids_to_local_experts("),
        ("model_executor/forward_batch_info.py", 2014, "model_runner.attn_backend.get_cpu_graph_seq_len_fill_value()"),
        ("distributed/parallel_state.py", 1226, "def _deterministic_reduce_scatterv("),
        ("managers/scheduler_components/idle_sleeper.py", 37, "self.poller.poll(1000)"),
        ("managers/data_parallel_controller.py", 932, "recv_req = sock_recv(self.recv_from_tokenizer, flags=zmq.NO"),
    ],
)
def test_what_parted_servers_lack_stands_where_it_was_read(file, line, begins):
    assert lines(f"sglang/srt/{file}", line, line, begins=begins)
