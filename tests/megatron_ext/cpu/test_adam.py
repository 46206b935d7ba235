"""The optimizer of a machine without Transformer Engine is the Adam of the papers, and keeps its state where a
checkpoint looks for it."""

import pytest
import torch

from tests.support.ranks import run_alone

HOW = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def apart(decoupled: bool, decay: float):
    """The largest difference of weights after five steps, and the names of the state."""
    from megatron_ext.cpu.adam import FusedAdam

    torch.manual_seed(0)
    values = [torch.randn(n) for n in (1, 37, 4096)]
    mine, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizers = (
        FusedAdam(mine, weight_decay=decay, adam_w_mode=decoupled, **HOW),
        kind(theirs, weight_decay=decay, **HOW),
    )
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].param_groups[0]["step"] == 5
    largest = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
    return largest, sorted(optimizers[0].state[mine[0]])


@pytest.mark.parametrize(("decoupled", "decay"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_steps_are_those_of_torchs_adam_and_the_step_count_is_in_the_group(decoupled, decay):
    ((largest, state),) = run_alone(apart, decoupled, decay)
    assert largest < 1e-6
    assert state == ["exp_avg", "exp_avg_sq"]
