"""What the image for GPUs and a rank's process rely on in the vendors' sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.trainer.rank import own_gpu
from tests.support.vendor import lines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "file", "line", "begins"),
    [
        # Before torch's own, Transformer Engine loads a cuDNN that it finds on the system, but for this variable.
        ("CUDNN_PATH=", "transformer_engine/common/__init__.py", 392, 'os.environ.get(f"{lib_name.upper()}_PATH"),'),
        # Where it is not built in, whoever asks for it is told; nobody does.
        (
            "NVTE_WITH_NCCL_EP=0",
            "transformer_engine/__init__.py",
            67,
            '"NCCL EP library libnccl_ep.so is not installed',
        ),
    ],
)
def test_the_image_sets_what_transformer_engine_asks_for(words, file, line, begins):
    assert words in (ROOT / "Dockerfile").read_text()
    lines(file, line, line, begins=begins)


def test_gradients_are_added_up_in_the_matrix_product_with_apex_only():
    """The LM head is Megatron-Core's own linear layer, which refuses the fusion where apex is not installed."""
    lines(
        "megatron/core/tensor_parallel/layers.py", 1070, 1070,
        begins="if config.gradient_accumulation_fusion and not _grad_accum_fusion_available:",
    )  # fmt: skip
    assert '"gradient_accumulation_fusion": False' in (ROOT / "megatron_ext/model/build.py").read_text()


def test_a_rank_takes_the_gpu_that_ray_gave_it_whether_or_not_it_sees_others():
    lines("ray/_private/accelerators/nvidia_gpu.py", 112, 112, begins="if env_bool(NOSET_CUDA_VISIBLE_DEVICES_ENV_VAR")
    assert own_gpu(["5"], {}) == "0"  # the mask leaves one
    assert own_gpu(["5"], {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}) == "5"
    assert own_gpu(["5"], {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}) == "0"
    assert own_gpu([], {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}) == "0"
