"""Adam laid out like Transformer Engine's FusedAdam.

Megatron's distributed optimizer reshards a checkpoint only when the step count lives in the parameter group and the
state holds `exp_avg` and `exp_avg_sq`; torch's AdamW keeps a step per parameter and its checkpoints do not reshard.
"""

from __future__ import annotations

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, 1412.6980, algorithm 1), with decoupled weight decay (1711.05101) when `adam_w_mode`."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        adam_w_mode=True,
        **_fused_options,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            group["step"] = step = int(group.get("step", 0)) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
            kernel(  # one pass over memory, where torch's operations on lists are eight
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(step))] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install() -> None:
    """Let Megatron's optimizers believe that Transformer Engine's Adam is there."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_TE_OPTIMIZER = FusedAdam, True, True
