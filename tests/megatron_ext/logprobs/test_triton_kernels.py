"""The Triton kernels: right in the interpreter, and compiled for an H100 as they were meant to be. No GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ext.logprobs.tiles import FLOOR
from megatron_ext.logprobs.triton_kernels import LARGE, TritonTiles, gradient_kernel, stats_kernel
from tests.support.interpret_triton import RUNS
from tests.support.logprob_cases import VOCAB, Answer, case, exact


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, Answer]:
    out = tmp_path_factory.mktemp("triton") / "answers.pt"
    command = [sys.executable, "-m", "tests.support.interpret_triton", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[3])
    return {name: Answer(*tensors) for name, tensors in torch.load(out).items()}


@pytest.mark.parametrize("name", RUNS)
def test_values_and_gradients_equal_float64_in_the_interpreter(interpreted, name):
    run, c, answer = RUNS[name], case(), interpreted[name]
    if run.head != "fp32":
        c = c._replace(hidden=c.hidden.bfloat16(), weight=c.weight.bfloat16())
    if not run.entropy:
        c = c._replace(of_entropy=torch.zeros_like(c.of_entropy))
    expected = exact(c, temperature=run.temperature, kept=run.kept)
    *values, of_hidden, of_weight = answer.errors(expected)
    assert (answer.of_weight[VOCAB:] == 0).all()
    low, high = (0.01, 0.2) if run.head == "bf16" else (0.0, 1e-5)  # that head must round
    assert low < max(values) < high
    if run.head == "fp32":
        assert max(of_hidden, of_weight) < 1e-4
    for mine, true in zip(
        answer[2:], expected[2:], strict=True
    ):  # the interpreter truncates where a GPU rounds to bf16
        assert (mine.double() - true).norm() < (0.1 if run.head == "bf16" else 0.01) * true.norm()


def test_a_row_that_the_copy_engine_cannot_read_is_refused():
    x, w, labels = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden size 6 in torch\.float32 is no multiple of 16 bytes"):
        TritonTiles(1.0, False).stats(x, w, labels, None)


@pytest.mark.parametrize("kernel", [stats_kernel, gradient_kernel])
def test_kernels_with_every_option_compile_for_an_h100_without_spills(kernel, tmp_path):
    """Its matrix units through wgmma, its copy engine, shared memory that fits, and every register kept."""
    depth = LARGE.depth_bytes // 2
    types = {
        "hidden": f"tensordesc<bf16[{LARGE.tokens},{depth}]>", "weight": f"tensordesc<bf16[{LARGE.columns},{depth}]>",
        "labels": "*i64", "kept": "*i32", "out": "*bf16", "inverse_temperature": "fp32",
        **dict.fromkeys(("parts", "target", "lse", "entropy", "of_logprob", "of_entropy"), "*fp32"),
        **dict.fromkeys(("tokens", "columns", "depth", "kept_stride"), "i32"),
    }  # fmt: skip
    constants = {
        "FLOOR": FLOOR, "ROUNDS": True, "OPERAND": tl.bfloat16,
        "TOKENS": LARGE.tokens, "COLUMNS": LARGE.columns, "DEPTH": depth, "GROUP": LARGE.group,
    }  # fmt: skip
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": LARGE.warps, "num_stages": LARGE.stages},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage
