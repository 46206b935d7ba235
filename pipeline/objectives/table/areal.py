"""What AReaL v0.5.0 ships under the names of papers, with other mathematics."""

from __future__ import annotations

from dataclasses import replace

from pipeline.objectives.composition import Composition
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.table.preset import Preset

_AREAL_CELLS = Composition(
    advantage="group_std",
    ratio="token",
    surrogate="clip",
    reduction="token_mean",
    clip_low=0.4,
    clip_high=0.4,
    corrections=(CorrectionConfig(kind="token_mis", high=5.0),),
    whiten=True,
    std="sample",
    std_epsilon=1e-5,
)
_AREAL_SOURCES = {
    "clip": "eps_clip 0.4 of that file",
    "std": "its NormConfig: n - 1, plus 1e-5; of the group, and of the batch's tokens",
    "reward": "reward_scaling 10 and reward_bias -0.5 of that file are left out: centring and whitening undo them",
}

AREAL: dict[str, Preset] = {
    "areal_grpo": Preset(
        title="AReaL's GRPO",
        paper="AReaL v0.5.0, examples/math/gsm8k_grpo.yaml",
        equation="w_t 1[w_t <= 5] min(r_t A, clip(r_t, 1-e, 1+e) A), mean over tokens; A = whiten((R - mean)/std)",
        coefficient="w_t r_t A",
        breaks="not the paper's GRPO: no 1/N, advantages whitened again over the batch's tokens, masked w_t",
        cells=_AREAL_CELLS,
        sources=_AREAL_SOURCES | {"correction": "behav_imp_weight_cap 5 of that file"},
    ),
    "areal_dr_grpo": Preset(
        title="AReaL's Dr.GRPO",
        paper="AReaL v0.5.0, examples/math/gsm8k_drgrpo.yaml",
        equation="w_t 1[w_t <= 5] min(r_t A, clip(r_t, 1-e, 1+e) A), mean over tokens; A = whiten(R - mean)",
        coefficient="w_t r_t A",
        breaks="not the paper's Dr.GRPO: a mean over tokens, and whitening brings a std back, the batch's",
        cells=replace(_AREAL_CELLS, advantage="group_mean"),
        sources=_AREAL_SOURCES | {"correction": "behav_imp_weight_cap 5 of that file"},
    ),
    "areal_gspo": Preset(
        title="AReaL's GSPO",
        paper="AReaL v0.5.0, examples/math/gsm8k_gspo.yaml",
        equation="N mean_t(w_t 1[w_t <= 5]) min(s A, clip(s, 1-e, 1+e) A) / tokens of the batch; "
        "A = whiten((R - mean)/std)",
        coefficient="mean_t(w_t 1[w_t <= 5]) s A",
        breaks="not the paper's GSPO: no 1/N, a clip of 0.4 around s that never binds, advantages whitened again",
        cells=replace(_AREAL_CELLS, ratio="sequence", corrections=(CorrectionConfig(kind="mean_mis", high=5.0),)),
        sources=_AREAL_SOURCES
        | {
            "correction": "behav_imp_weight_cap 5 of that file, on the term that all tokens of a response share: their "
            "mean is what remains of it"
        },
    ),
    "areal_sapo": Preset(
        title="AReaL's SAPO",
        paper="AReaL v0.5.0, examples/math/gsm8k_sapo.yaml",
        equation="f(rho_t) A, mean over tokens; f as in SAPO, rho = pi/mu; A = whiten((R - mean)/std)",
        coefficient="sech^2(tau (rho_t-1)/2) rho_t A",
        breaks="not the paper's SAPO: no 1/N, the gate sees the engines' discrepancy too, advantages whitened again",
        cells=replace(
            _AREAL_CELLS,
            surrogate="soft_gate",
            clip_low=None,
            clip_high=None,
            corrections=(),
            ratio_to="rollout",
            tau_positive=1.0,
            tau_negative=1.05,
        ),
        sources={
            "tau": "1.0 and 1.05 of that file",
            "ratio_to": "recompute_logprob and use_decoupled_loss are false in that file: the old policy is mu",
            "std": _AREAL_SOURCES["std"],
            "reward": _AREAL_SOURCES["reward"],
        },
    ),
}
