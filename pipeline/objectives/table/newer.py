"""Rows of 2025 and 2026 that bound a probability, a product or a second moment, and those with other baselines."""

from __future__ import annotations

from pipeline.objectives.composition import Composition, KLConfig
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.table.preset import Preset

_DPPO = {
    "clip": "no clip of a ratio",
    "trust_weight": "20: verl's default; its authors' scripts use 10",
    "ratio_to": "mu, as its authors' code; their `recompute` variants take pi_o; write ratio_to: proximal",
    "reduction": "a sum over a constant, and no std: verl's script for it",
}

NEWER: dict[str, Preset] = {
    "dppo_tv": Preset(
        title="DPPO, binary TV",
        paper="2602.04879",
        equation="M_t sg[min(rho_t, 20)] A log pi_t, sum over tokens / (S max_length); M = 0 if A > 0 and pi - mu > d, "
        "or A < 0 and mu - pi > d; A = R - mean",
        coefficient="M_t min(rho_t, 20) A",
        breaks="a rare token may grow many times over before its probability has moved by d",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            ratio_to="rollout",
            surrogate="trust_region",
            reduction="token_sum_constant",
            divergence="binary_tv",
            trust_low=0.15,
            trust_high=0.15,
            trust_weight=20.0,
        ),
        sources=_DPPO | {"divergence": "0.15: verl's script (dppo_tv); of the top k: not here, mu's top k is not kept"},
    ),
    "dppo_kl": Preset(
        title="DPPO, binary KL",
        paper="2602.04879",
        equation="M_t sg[min(rho_t, 20)] A log pi_t, sum over tokens / (S max_length); M = 0 if D > d and A > 0 and "
        "pi > mu, or D > d and A < 0 and pi < mu; D = mu log(mu/pi) + (1-mu) log((1-mu)/(1-pi)); A = R - mean",
        coefficient="M_t min(rho_t, 20) A",
        breaks="as dppo_tv; the KL of a sure token (mu near 1) that the trainer doubts is large at once",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            ratio_to="rollout",
            surrogate="trust_region",
            reduction="token_sum_constant",
            divergence="binary_kl",
            trust_low=0.05,
            trust_high=0.05,
            trust_weight=20.0,
        ),
        sources=_DPPO | {"divergence": "0.05 nats: verl's script (dppo_kl)"},
    ),
    "ipo": Preset(
        title="prime-rl's IPO",
        paper="prime-rl, trainer/rl/loss.py (ipo), August 2026",
        equation="M_t sg[rho_t] A log pi_t - tau (log rho_t)^2, mean over tokens; M = 1[|pi - mu| <= .1]; A = R - mean",
        coefficient="M_t rho_t A - 2 tau log rho_t",
        breaks="nothing bounds rho of a rare token; also drops a token that its advantage would bring back",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            ratio_to="rollout",
            surrogate="trust_region",
            reduction="token_mean",
            divergence="binary_tv",
            trust_low=0.1,
            trust_high=0.1,
            trust_both=True,
            kl=KLConfig(estimator="k2", beta=2e-3, to="rollout"),
        ),
        sources={
            "divergence": "ipo_threshold 0.1 of that file",
            "kl": "kl_tau 1e-3 of that file, times (log rho)^2: 2e-3 times k2; on every token, dropped ones too",
        },
    ),
    "vespo": Preset(
        title="VESPO",
        paper="2602.10693",
        equation="sg[phi(W)] A log pi_t, mean over tokens; W = prod_t rho_t, phi(W) = e^lambda W^k e^(-lambda W), k "
        "and lambda by the sign of A; A = (R - mean)/std",
        coefficient="phi(W) A",
        breaks="W leaves the gate as N grows: a long answer that has moved a little everywhere weighs nothing",
        cells=Composition(
            advantage="group_std",
            ratio="product",
            ratio_to="rollout",
            surrogate="gamma_gate",
            reduction="token_mean",
            power_positive=2.0,
            decay_positive=3.0,
            power_negative=3.0,
            decay_negative=2.0,
        ),
        sources={
            "gate": "k 2 and lambda 3 where A > 0, 3 and 2 elsewhere: its authors' scripts and TRL",
            "reduction": "its authors' scripts and TRL; the paper writes a sum over an answer",
        },
    ),
    "luspo": Preset(
        title="LUSPO",
        paper="2602.05261",
        equation="N min(s A, clip(s, 1-el, 1+eh) A), mean over sequences; A = (R - mean)/std",
        coefficient="s A",
        breaks="as Dr.GSPO, and the std weighs prompts as in GRPO",
        cells=Composition(
            advantage="group_std",
            ratio="sequence",
            surrogate="clip",
            reduction="sequence_mean_token_sum",
            clip_low=2e-3,
            clip_high=2.5e-3,
        ),
        sources={"clip": "section 5.1 of the paper, as TRL's index of papers gives it"},
    ),
    "icepop": Preset(
        title="IcePop on pi/mu",
        paper="2510.18855; with the current policy on top: INTELLECT-3, prime-rl",
        equation="sg[rho_t 1[.5 <= rho_t <= 5]] A log pi_t, mean over tokens; A = R - mean",
        coefficient="rho_t 1[.5 <= rho_t <= 5] A",
        breaks="the same bound for staleness and discrepancy: after many updates it drops what has learnt most",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            surrogate="reinforce",
            reduction="token_mean",
            corrections=(CorrectionConfig(kind="icepop", numerator="current"),),
        ),
        sources={"correction": "0.5 and 5: IcePop; write kind: icepop under grpo for the paper's, on pi_o/mu"},
    ),
    "maxrl": Preset(
        title="MaxRL",
        paper="2602.02710",
        equation="min(r_t A, clip(r_t, 1-e, 1+e) A), sum over tokens / (S max_length); A = (R - mean)/mean, 0 if "
        "mean <= 0",
        coefficient="r_t A",
        breaks="for rewards that are never negative; the one right answer of a prompt solved once in G has A = G - 1",
        cells=Composition(
            advantage="mean_relative",
            ratio="token",
            surrogate="clip",
            reduction="token_sum_constant",
            clip_low=0.2,
            clip_high=0.2,
        ),
        sources={
            "advantage": "the paper, and prime-rl's max_rl",
            "clip": "PPO's 0.2, and Dr.GRPO's reduction: the paper changes the advantage only",
        },
    ),
    "m2po": Preset(
        title="M2PO",
        paper="2510.01161",
        equation="M_t sg[rho_t] A log pi_t, mean over a prompt's tokens, then over prompts; M drops the tokens of "
        "largest (log w_t)^2 until its mean over the batch is below .04; A = (R - mean)/std",
        coefficient="M_t rho_t A",
        breaks="the bound is on pi_o/mu: what moves after the start of the update is not bounded",
        cells=Composition(
            advantage="group_std",
            ratio="token",
            surrogate="reinforce",
            reduction="prompt_token_mean",
            corrections=(CorrectionConfig(kind="token_is", numerator="current"),),
            second_moment=0.04,
        ),
        sources={
            "second_moment": "0.04: the paper's, in AReaL's example; over pi_o/mu and the whole batch, so that it does "
            "not depend on how a batch is cut; AReaL takes what one call holds",
            "reduction": "1/sum_i N_i within a prompt, as AReaL's page gives the paper's objective",
        },
    ),
    "reinforce_baseline": Preset(
        title="REINFORCE++-baseline",
        paper="2501.03262",
        equation="min(r_t A, clip(r_t, 1-e, 1+e) A), mean over tokens; A = whiten(R - mean of its group)",
        coefficient="r_t A",
        breaks="whitening takes off the mean over tokens: where right answers are the longer ones, A is below R - mean",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            surrogate="clip",
            reduction="token_mean",
            clip_low=0.2,
            clip_high=0.2,
            whiten=True,
        ),
        sources={
            "clip": "PPO's 0.2",
            "advantage": "verl (reinforce_plus_plus_baseline) and OpenRLHF (reinforce_baseline)",
        },
    ),
    "scalerl": Preset(
        title="ScaleRL's CISPO",
        paper="2510.13786",
        equation="sg[min(rho_t, 5)] A log pi_t, mean over a prompt's tokens, then over prompts; A = (R - mean)/std of "
        "that over the batch",
        coefficient="min(rho_t, 5) A",
        breaks="as CISPO; a batch of few informative groups has a std that one group decides",
        cells=Composition(
            advantage="batch_scaled",
            ratio="token",
            ratio_to="rollout",
            surrogate="stop_gradient_clip",
            reduction="prompt_token_mean",
            clip_high=4.0,
            dynamic_sampling=True,
        ),
        sources={
            "clip": "a ratio of at most 5: TRL's recipe for it",
            "dynamic_sampling": "the paper leaves groups of equal rewards out; here they are replaced too",
        },
    ),
}
