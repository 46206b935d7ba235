"""Rows of papers up to 2025."""

from __future__ import annotations

from pipeline.objectives.composition import Composition, KLConfig
from pipeline.objectives.correction_config import CorrectionConfig
from pipeline.objectives.table.preset import Preset

PUBLISHED: dict[str, Preset] = {
    "reinforce": Preset(
        title="REINFORCE",
        paper="Williams 1992 (Machine Learning 8), off-policy by importance sampling",
        equation="sum_t sg[rho_t] A log pi_t, mean over sequences; rho = pi/mu; A = R - mean(R)",
        coefficient="rho_t A",
        breaks="nothing bounds rho: one token far from mu decides a batch; many updates per batch diverge",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            surrogate="reinforce",
            reduction="sequence_mean_token_sum",
            corrections=(CorrectionConfig(kind="token_is", numerator="current"),),
        ),
        sources={"correction": "none in 1992: rho = 1 on policy; token_is of current/rollout is rho"},
    ),
    "rloo": Preset(
        title="RLOO",
        paper="2402.14740 (leave-one-out: Kool et al. 2019)",
        equation="sum_t sg[rho_t] A log pi_t, mean over sequences; A_i = R_i - mean of the others "
        "= G/(G-1) (R_i - mean)",
        coefficient="rho_t A",
        breaks="as REINFORCE; a prompt with one sample has no others and is refused",
        cells=Composition(
            advantage="leave_one_out",
            ratio="token",
            surrogate="reinforce",
            reduction="sequence_mean_token_sum",
            corrections=(CorrectionConfig(kind="token_is", numerator="current"),),
        ),
        sources={
            "kl": "the paper puts k1 with beta 0.03 in the reward; write kl: {estimator: k1, beta: 0.03, place: reward}"
        },
    ),
    "reinforce_plus_plus": Preset(
        title="REINFORCE++",
        paper="2501.03262",
        equation="min(r_t A_t, clip(r_t, 1-e, 1+e) A_t), mean over tokens; A_t = whiten(R - beta sum_{i>=t} k1_i)",
        coefficient="r_t A_t",
        breaks="no baseline per prompt: easy prompts push everything up and hard ones everything down until whitening "
        "over many prompts cancels it",
        cells=Composition(
            advantage="batch_std",
            ratio="token",
            surrogate="clip",
            reduction="token_mean",
            clip_low=0.2,
            clip_high=0.2,
            kl=KLConfig(estimator="k1", beta=0.01, place="reward"),
        ),
        sources={
            "clip": "PPO's 0.2",
            "kl": "k1 in the reward: the paper; beta 0.01: the default of OpenRLHF, its authors' code",
        },
    ),
    "ppo": Preset(
        title="PPO",
        paper="1707.06347, eq. 7, with GAE (1506.02438) from a value model trained beside the policy",
        equation="min(r_t A_t, clip(r_t, 1-e, 1+e) A_t), mean over tokens; A = GAE; + 1/2 the clipped value loss",
        coefficient="r_t A_t",
        breaks="a critic that is wrong early biases every advantage (lambda < 1); costs a second model",
        cells=Composition(
            advantage="gae",
            ratio="token",
            surrogate="clip",
            reduction="token_mean",
            clip_low=0.2,
            clip_high=0.2,
        ),
        sources={
            "clip": "table 1 of the paper",
            "gae": "lambda 0.95: tables 3 and 4 of the paper; gamma 1: InstructGPT, 2203.02155, appendix C.4",
            "credit": "episode: GAE's steps are tokens; write credit: turn for turns as steps (2512.17008)",
            "value": "coefficient 0.5 and clip 0.2: its authors' code (baselines, ppo2)",
            "dual_clip": "off; write surrogate: dual_clip and dual_clip: 3 (1912.09729)",
        },
    ),
    "grpo": Preset(
        title="GRPO",
        paper="2402.03300, eq. 3",
        equation="1/N sum_t min(r_t A, clip(r_t, 1-e, 1+e) A), mean over sequences; A = (R - mean)/(std + eps)",
        coefficient="r_t A / N",
        breaks="1/N makes right answers shorter and wrong ones longer; the std favours very easy and very hard prompts",
        cells=Composition(
            advantage="group_std",
            ratio="token",
            surrogate="clip",
            reduction="sequence_mean_token_mean",
            clip_low=0.2,
            clip_high=0.2,
        ),
        sources={
            "clip": "PPO's 0.2; the paper gives none",
            "std_epsilon": "against 0/0; the paper has none",
            "kl": "the paper has k3 with beta 0.04 in the loss; off here; write kl: {estimator: k3, beta: 0.04}",
        },
    ),
    "dr_grpo": Preset(
        title="Dr.GRPO",
        paper="2503.20783, section 3.2",
        equation="sum_t min(r_t A, clip(r_t, 1-e, 1+e) A) / (S max_length); A = R - mean",
        coefficient="r_t A",
        breaks="variance grows with length; the step shrinks with max_length, so the learning rate goes with it",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            surrogate="clip",
            reduction="token_sum_constant",
            clip_low=0.2,
            clip_high=0.2,
        ),
        sources={"clip": "PPO's 0.2"},
    ),
    "dapo": Preset(
        title="DAPO",
        paper="2503.14476, eq. 8",
        equation="min(r_t A, clip(r_t, 1-el, 1+eh) A), mean over a prompt's tokens, then over prompts; "
        "A = (R - mean)/std; equal groups replaced",
        coefficient="r_t A",
        breaks="dynamic sampling costs rollouts when most groups are all right or all wrong; the std as in GRPO",
        cells=Composition(
            advantage="group_std",
            ratio="token",
            surrogate="clip",
            reduction="prompt_token_mean",
            clip_low=0.2,
            clip_high=0.28,
            dynamic_sampling=True,
            overlong_fraction=0.2,
        ),
        sources={
            "clip": "section 4.1 of the paper",
            "reduction": "eq. 8 of the paper: 1/sum_i N_i within a prompt, its mean over prompts; others ship one mean "
            "over the tokens of the batch under this name; write reduction: token_mean",
            "overlong_fraction": "4,096 of 20,480 tokens, section 4.1 of the paper",
        },
    ),
    "gspo": Preset(
        title="GSPO",
        paper="2507.18071, eq. 5",
        equation="min(s A, clip(s, 1-el, 1+eh) A), mean over sequences; s = exp(mean_t log r_t), A = (R - mean)/std",
        coefficient="s A / N",
        breaks="1/N as in GRPO; fed rollout log-probs as pi_o the discrepancy alone leaves the clip: use pi/pi_o",
        cells=Composition(
            advantage="group_std",
            ratio="sequence",
            surrogate="clip",
            reduction="sequence_mean",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
        sources={"clip": "section 5.1 of the paper"},
    ),
    "gspo_token": Preset(
        title="GSPO-token",
        paper="2507.18071, eq. 13",
        equation="1/N sum_t min(s_t A_t, clip(s_t, 1-el, 1+eh) A_t), mean over sequences; s_t = sg[s] pi_t / sg[pi_t]",
        coefficient="s A_t / N",
        breaks="as GSPO, to which it is equal when A_t is the same at every token",
        cells=Composition(
            advantage="group_std",
            ratio="sequence_token",
            surrogate="clip",
            reduction="sequence_mean_token_mean",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
        sources={"clip": "section 5.1 of the paper"},
    ),
    "dr_gspo": Preset(
        title="Dr.GSPO",
        paper="the tutorial this project implements; 2602.05261",
        equation="N min(s A, clip(s, 1-el, 1+eh) A), mean over sequences; A = R - mean",
        coefficient="s A",
        breaks="biased at first order in the gradient like GSPO; a long sequence weighs N times a one-token one",
        cells=Composition(
            advantage="group_mean",
            ratio="sequence",
            surrogate="clip",
            reduction="sequence_mean_token_sum",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
        sources={"clip": "GSPO's: s is clipped, not N s"},
    ),
    "gmpo": Preset(
        title="GMPO",
        paper="2507.20673",
        equation="A exp(1/N sum_t l'_t), mean over sequences; l' = min(log r, e) if A > 0, max(log r, -e) if A < 0",
        coefficient="s' A / N where token t is not clipped",
        breaks="1/N as in GRPO; a clipped token still scales the others' gradient",
        cells=Composition(
            advantage="group_std",
            ratio="sequence",
            surrogate="log_space_clip",
            reduction="sequence_mean",
            clip_low=0.4,
            clip_high=0.4,
        ),
        sources={"clip": "(e^-0.4, e^0.4), the range the paper settles on"},
    ),
    "cispo": Preset(
        title="CISPO",
        paper="2506.13585, eq. 4 and 5",
        equation="sg[clip(r_t, ., 1+eh)] A log pi_t, mean over a prompt's tokens, then over prompts; "
        "A = (R - mean)/std",
        coefficient="clip(r_t) A",
        breaks="nothing stops a token that has moved far: many updates per batch keep pushing it",
        cells=Composition(
            advantage="group_std",
            ratio="token",
            surrogate="stop_gradient_clip",
            reduction="prompt_token_mean",
            clip_high=4.0,
        ),
        sources={
            "clip": "no lower bound: the paper; it gives no number for the upper one; a ratio of at most 5 is what "
            "TRL's recipe for ScaleRL (2510.13786) uses",
            "reduction": "eq. 4 of the paper, as DAPO's; others ship one mean over the tokens of the batch",
        },
    ),
    "sapo": Preset(
        title="SAPO",
        paper="2511.20347",
        equation="1/N sum_t f(r_t) A, mean over sequences; f(r) = (4/tau) sigmoid(tau (r-1)); A = (R - mean)/std",
        coefficient="sech^2(tau (r_t-1)/2) r_t A / N",
        breaks="1/N and std as in GRPO; the gate fades but never closes",
        cells=Composition(
            advantage="group_std",
            ratio="token",
            surrogate="soft_gate",
            reduction="sequence_mean_token_mean",
            tau_positive=1.0,
            tau_negative=1.05,
        ),
        sources={"tau": "the paper's 1.0 where A > 0 and 1.05 elsewhere"},
    ),
    "minirl": Preset(
        title="MiniRL",
        paper="2512.01374",
        equation="sum_t M_t sg[min(rho_t, 5)] A log pi_t, mean over sequences; M = 0 if A > 0 and r > 1+eh, or A < 0 "
        "and r < 1-el; A = R - mean",
        coefficient="M_t min(rho_t, 5) A",
        breaks="a first-order approximation: good while pi, pi_o and mu are close; variance grows with length",
        cells=Composition(
            advantage="group_mean",
            ratio="token",
            surrogate="mask",
            reduction="sequence_mean_token_sum",
            clip_low=0.2,
            clip_high=0.27,
            corrections=(CorrectionConfig(kind="token_tis", high=5.0, numerator="current"),),
        ),
        sources={"clip": "the paper's 0.8 and 1.27", "correction": "the paper's truncation at 5"},
    ),
}
