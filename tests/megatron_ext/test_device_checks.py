"""The checks of `make test-gpu`, at small sizes on the CPU: on a GPU only the device and the sizes differ."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.gpu import needs
from tests.gpu.checks import kernels, training
from tests.support.ranks import run_alone


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "fp32_accumulate")],
    ids=str,
)
def test_the_fused_log_prob_is_the_matmuls(dtype, head):
    errors = kernels.fused_logprobs("cpu", tokens=40, vocab=700, hidden=64, dtype=dtype, head=head)
    assert max(errors[:2]) < 1e-4
    assert max(errors[2:]) < (1e-4 if dtype == torch.float32 else 0.01)


def test_rounded_logits_are_seen():
    errors = kernels.fused_logprobs("cpu", tokens=40, vocab=700, hidden=64, dtype=torch.bfloat16, head="bf16")
    assert 1e-3 < errors.logprob < 0.06


def selection(tokens: int, experts: int, topk: int) -> None:
    kernels.replayed_selection("cpu", tokens=tokens, experts=experts, topk=topk)
    kernels.packed_and_back("cpu", sequences=9, longest=64)


def test_replay_and_packing():
    run_alone(selection, 50, 16, 3)


def both(directory, family: str, dtype: str):
    """The run that writes the weights, and one that reads them."""
    return [training.train(directory, family, dtype, make=make) for make in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in training.FAMILIES if name != "large"])
def test_a_run_that_reads_the_weights_is_the_one_that_wrote_them(family, tmp_path):
    ((wrote, read),) = run_alone(both, tmp_path, family, "float32")
    assert read == wrote
    assert read["losses"][-1] < read["losses"][0]
    assert len(read["before"]) == len(read["after"]) > 8
    assert not np.array_equal(read["before"], read["after"])
    assert all(counts[0] > 0 for counts in read["routing"])
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == training.VOCAB


def test_memory_is_planned_where_it_cannot_be_measured(tmp_path):
    (said,) = run_alone(_memory, tmp_path)
    assert said["held"] is None
    assert said["planned_held"] < said["planned_peak"] < said["planned_all"]


def _memory(directory):
    return training.memory(directory, "qwen3_moe", "bfloat16", longest=20)


def test_a_machine_without_a_gpu_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in (needs.lacking() or "")
    monkeypatch.setitem(needs.PACKAGES, "no_such_module", "no-such-package")
    said = needs.lacking()
    assert said is not None
    assert "no-such-package" in said
    assert "\n" not in said
