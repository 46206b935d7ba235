"""safetensors reads what is written a tensor at a time."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.hf.writer import SafetensorsWriter


def tensors():
    return {
        "odd": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
        "bias": torch.arange(3, dtype=torch.float32),
        "transposed": torch.arange(6, dtype=torch.float32).view(2, 3).T,
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_tensors_of_two_dtypes_come_back_in_any_order_of_writing(tmp_path, order):
    with open(tmp_path / "it", "wb") as stream:
        writer = SafetensorsWriter(stream, tensors())
        for name, tensor in list(tensors().items())[::order]:
            writer.write(name, tensor)
    back = load_file(tmp_path / "it")
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
