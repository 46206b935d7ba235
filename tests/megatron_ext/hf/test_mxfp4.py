"""MXFP4 weights are read as transformers reads them."""

import torch
from safetensors.torch import save_file

from megatron_ext.hf.files import TensorFiles
from megatron_ext.hf.mxfp4 import dequantise


def random_weights(*rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code, and every exponent but that of NaN."""
    return (
        torch.randint(0, 256, (*rows, 3, 16), dtype=torch.uint8),
        torch.randint(0, 255, (*rows, 3), dtype=torch.uint8),
    )


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def test_every_bit_is_that_of_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_weights(4, 50)
    assert torch.equal(bits(dequantise(blocks, scales)), bits(convert_moe_packed_tensors(blocks, scales)))


def test_a_directory_shows_them_as_plain_tensors_and_reads_one_expert(tmp_path):
    blocks, scales = random_weights(4, 50)
    stored = {"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(4, 50), "other_blocks": blocks.clone()}
    save_file(stored, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert sorted(files.files) == sorted(files.shapes) == sorted(files.dtypes) == ["other_blocks", "w", "w_bias"]
    assert (files.shapes["w"], files.dtypes["w"], files.mxfp4) == ((4, 96, 50), "BF16", ["w"])
    assert torch.equal(bits(files["w"]), bits(dequantise(blocks, scales)))
    assert torch.equal(bits(files.read("w", 2)), bits(files["w"][2]))
    assert torch.equal(files.read("w_bias", 1), torch.ones(50))
