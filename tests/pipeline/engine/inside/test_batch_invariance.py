"""With products padded to a few rows, a row becomes the same bits whatever is computed beside it."""

import pytest
import torch

from pipeline.engine.inside.cpu.batch_invariance import padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(64, 256), (128, 64), (64, 8), (96, 40), (512, 64), (1024, 64)])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype, width, out):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, width, generator=generator).to(dtype)
    weight = torch.randn(out, width, generator=generator).to(dtype)

    def product(rows):
        return torch.nn.functional.linear(rows, weight)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the server
    try:
        whole = padded(product, x)
        for count in (1, 2, 3, 4, 7, 15, 16, 17, 63):
            for start in range(0, 130 - count, 13):
                assert torch.equal(padded(product, x[start : start + count]), whole[start : start + count])
    finally:
        torch.set_num_threads(threads)


def test_shapes_are_those_of_the_product_itself():
    weight = torch.ones(5, 4)

    def product(rows):
        return rows @ weight.t()

    assert padded(product, torch.ones(2, 3, 4)).shape == (2, 3, 5)
    assert padded(product, torch.ones(4)).shape == (5,)
    assert padded(product, torch.ones(0, 4)).shape == (0, 5)
