"""One tiny model and one real SGLang server for the whole session; both start when a test first asks for them."""

from __future__ import annotations

import gc
import os
import sys

import pytest

from tests.support import costs

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "pad_token_id": 256,
}


def save_tiny_model(folder, seed, **changes):
    """A random Qwen3-MoE in float32; returns the folder."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY | changes)).to(torch.float32).save_pretrained(folder)
    return folder


def pytest_sessionstart():
    """What is imported while tests are collected stays: no collection of garbage looks through it, now or later."""
    gc.disable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """The workers of the whole suite are forked from one process that has imported what they import."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        from tests.support import preloaded

        python = preloaded.python_of_workers(config._tmp_path_factory.getbasetemp(), os.getpid())
        for spec in specs:
            spec.python = python


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # workers share the cores: a second thread spins while it waits for the first


def pytest_collection_modifyitems(config, items):
    """Dear files first: no worker is left with one when the others have finished."""
    proofs = config.option.markexpr == "proof"
    items.sort(key=lambda item: -costs.of(item.path, proofs))


def start_shared_memory():
    """Let torch start its manager of shared memory. It keeps its socket in the TMPDIR that it finds, and that of a run
    inside a test is removed with the run: no later test of the session could share a tensor."""
    import torch
    import torch.multiprocessing

    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    torch.zeros(1).share_memory_()
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory):
    """From now on servers and trainer ranks are forked from processes that have made their imports."""
    from tests.support import preloaded

    start_shared_memory()
    folder, keeper = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder, keeper = folder.parent, os.getppid()  # all workers' own
    with pytest.MonkeyPatch.context() as patch:
        for name, value in preloaded.start(folder, keeper).items():
            patch.setenv(name, value)
        preloaded.set_up_by_a_fork()
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny_model"), seed=0)


@pytest.fixture(scope="session")
def server(preloaded, tiny_model_dir, tmp_path_factory):
    """A server that tests share: leave its weights, its version and its state as you found them."""
    from pipeline.config.server import ServerConfig
    from pipeline.engine.server import SGLangServer

    with SGLangServer(
        ServerConfig(context_length=1024, startup_timeout_s=240),
        tiny_model_dir,
        tmp_path_factory.mktemp("server") / "sglang.log",
        device="cpu",
        seed=0,
        return_routed_experts=True,
    ) as running:
        yield running


def client_of(server, timeout_s):
    """A client of a server that serves a tiny model."""
    from pipeline.engine.client import SGLangClient

    return SGLangClient(
        server.url,
        vocab_size=TINY["vocab_size"],
        num_layers=TINY["num_hidden_layers"],
        topk=TINY["num_experts_per_tok"],
        num_experts=TINY["num_experts"],
        keys=server.keys,
        timeout_s=timeout_s,
        log_path=server.log_path,
    )


@pytest.fixture
def client(server):
    return client_of(server, timeout_s=120)


@pytest.fixture(scope="session")
def tiny_dense_model_dir(tmp_path_factory):
    """A random Qwen3 of the same shape, without experts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {key: value for key, value in TINY.items() if "expert" not in key and "moe" not in key}
    shape.pop("norm_topk_prob")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    Qwen3ForCausalLM(Qwen3Config(**shape)).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coded_model_dir(tmp_path_factory):
    """A random Qwen3-MoE with experts enough to write (sample, position, layer) in a route."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.support.route_codes import MODEL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coded")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(folder)
    return folder
