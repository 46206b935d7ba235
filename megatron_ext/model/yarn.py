"""YaRN (2309.00071) outside of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.mcore import TransformerConfig


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """With the fields that GPTModel and Attention (0.19.2) read of it, but TransformerConfig does not have.

    yarn_mscale, yarn_mscale_all_dim: None scales the rotation by 0.1 ln(factor) + 1.
    """

    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool = True
