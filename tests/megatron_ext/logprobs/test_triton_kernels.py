"""The Triton kernels: right in the interpreter, and compiled for an H100 as they were meant to be. No GPU needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ext.logprobs import triton_kernels
from megatron_ext.logprobs.tiles import FLOOR
from megatron_ext.logprobs.triton_kernels import (
    LARGE,
    MIDDLE,
    SHARED,
    SMALL,
    Blocks,
    TritonTiles,
    blocks_for,
    gradient_kernel,
    stats_kernel,
)
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


@pytest.mark.parametrize(
    ("capability", "hidden", "columns", "expected"),
    [
        ((9, 0), 2048, 151_936, LARGE),  # Qwen3-30B-A3B
        ((9, 0), 4096, 18_992, LARGE),  # Qwen3-235B-A22B, tensor-parallel over 8
        ((9, 0), 7168, 129_280, LARGE),  # DeepSeek-V3
        ((9, 0), 2048, 4_748, MIDDLE),  # over 32
        ((9, 0), 576, 49_152, MIDDLE),  # SmolLM2-135M
        ((10, 0), 1024, 151_936, MIDDLE),  # Qwen3-0.6B
        ((8, 0), 4096, 151_936, SMALL),
        ((12, 0), 4096, 151_936, SMALL),
    ],
)
def test_blocks_are_chosen_by_the_size_of_the_model(monkeypatch, capability, hidden, columns, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert blocks_for(torch.device("cuda"), hidden, columns) == expected


def test_the_shared_memory_of_a_processor_is_enough():
    """Barriers and reductions take less than 8 KiB beside the operands; 1 KiB a program is the system's."""
    for blocks, programs, limit in ((LARGE, 1, SHARED), (MIDDLE, 2, SHARED), (SMALL, 1, 99 * 1024)):
        assert programs * (blocks.shared_bytes + 8 * 1024 + 1024) <= limit, blocks


def test_all_tiles_of_a_call_are_of_the_blocks_of_its_whole_vocabulary(monkeypatch):
    """The last tile may be narrow; its columns must be added in the order of the others."""
    seen = []
    monkeypatch.setattr(triton_kernels, "blocks_for", lambda *a: seen.append(a[1:]) or (_ for _ in ()).throw(KeyError))
    x, labels = torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64)
    for columns in (8192, 256):
        with pytest.raises(KeyError):
            TritonTiles(1.0, False, 8448).stats(x, torch.zeros(columns, 64), labels, None)
    assert seen == [(64, 8448)] * 2


@pytest.mark.parametrize("blocks", [LARGE, MIDDLE], ids=["large", "middle"])
@pytest.mark.parametrize("kernel", [stats_kernel, gradient_kernel])
def test_kernels_with_every_option_compile_for_an_h100_without_spills(kernel, blocks: Blocks, tmp_path):
    """Its matrix units through wgmma, its copy engine, shared memory that fits, and every register kept."""
    depth = blocks.depth_bytes // 2
    types = {
        "hidden": f"tensordesc<bf16[{blocks.tokens},{depth}]>", "weight": f"tensordesc<bf16[{blocks.columns},{depth}]>",
        "labels": "*i64", "kept": "*i32", "out": "*bf16", "inverse_temperature": "fp32",
        **dict.fromkeys(("parts", "target", "lse", "entropy", "of_logprob", "of_entropy"), "*fp32"),
        **dict.fromkeys(("tokens", "columns", "depth", "kept_stride"), "i32"),
    }  # fmt: skip
    constants = {
        "FLOOR": FLOOR, "ROUNDS": True, "OPERAND": tl.bfloat16,
        "TOKENS": blocks.tokens, "COLUMNS": blocks.columns, "DEPTH": depth, "GROUP": blocks.group,
    }  # fmt: skip
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages}
        | ({"maxnreg": blocks.registers} if blocks.registers else {}),
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    programs = 1 if blocks is LARGE else 2
    assert programs * (compiled.metadata.shared + 1024) <= SHARED + 1024
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    assert programs * 32 * blocks.warps * registers <= 2**16, usage
