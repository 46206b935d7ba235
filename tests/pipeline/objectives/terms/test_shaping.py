from __future__ import annotations

import pytest
import torch

from pipeline.objectives import is_informative, overlong_penalty


def test_the_overlong_penalty_is_a_ramp_with_dapos_numbers() -> None:
    lengths = torch.tensor([0, 16_384, 16_385, 18_432, 20_480, 30_000])
    expected = [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, max_length=20_480, ramp=4_096).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ramp", [0, 11])
def test_a_ramp_outside_the_response_is_refused(ramp: int) -> None:
    with pytest.raises(ValueError, match="1 to max_length = 10"):
        overlong_penalty(torch.tensor([3]), max_length=10, ramp=ramp)


def test_only_a_group_with_different_rewards_is_informative() -> None:
    assert is_informative(torch.tensor([1.0, 0.0, 1.0]))
    assert not is_informative(torch.tensor([1.0, 1.0]))
    assert not is_informative(torch.tensor([0.0]))
    assert not is_informative(torch.zeros(0))
