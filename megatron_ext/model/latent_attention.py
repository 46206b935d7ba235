"""Multi-head latent attention from the modules that its spec names."""

from __future__ import annotations

from megatron_ext.mcore import IdentityOp, MLASelfAttention


class LatentAttention(MLASelfAttention):
    """Megatron-Core's, without its own choice of norms (0.19.2).

    Where queries have no latent, it replaces their projection by one that norms its input, which is normed already:
    another model than Moonlight. And it knows the fused norm of a projection only as Transformer Engine's class.
    """

    def _resolve_qk_norm_config(self, submodules):
        projections = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        fused = {"q_layernorm": IdentityOp, "kv_layernorm": IdentityOp}  # into the up-projections
        return fused | {name: getattr(submodules, name) for name in projections}
