"""Which cells go together: the sentence that says what does not, and what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from pipeline.objectives.cells import NEEDS, Advantage, Credit, Divergence, RatioLevel, Reduction, Std, Surrogate
from pipeline.objectives.correction_config import MASKS_ONLY

if TYPE_CHECKING:
    from pipeline.objectives.composition import Composition


def problem_of(cells: Composition) -> str | None:
    """The sentence that says what does not go together and what to write instead, or None."""
    for cell, allowed in (
        ("advantage", Advantage),
        ("ratio", RatioLevel),
        ("surrogate", Surrogate),
        ("reduction", Reduction),
        ("std", Std),
        ("credit", Credit),
    ):
        if getattr(cells, cell) not in get_args(allowed):
            return f"{cell}: {getattr(cells, cell)!r} is unknown; write one of {', '.join(get_args(allowed))}"
    for name in NEEDS[cells.surrogate]:
        if getattr(cells, name) is None:
            return f"surrogate: {cells.surrogate} needs {name}, and the preset has none; write {name} too"
    if cells.clip_low is not None and cells.clip_low > 1 and cells.surrogate != "log_space_clip":
        return f"clip_low: {cells.clip_low} puts the lower bound 1 - clip_low below 0; write at most 1"
    if cells.dual_clip is not None and cells.dual_clip <= 1:
        return f"dual_clip: {cells.dual_clip} bounds a ratio where A < 0; write a number above 1 (3 in its paper)"
    if cells.surrogate == "log_space_clip" and cells.ratio != "sequence":
        return (
            "surrogate: log_space_clip makes one term per sequence from clipped token ratios; write ratio: sequence "
            "with it, or surrogate: clip to clip each token's ratio on its own"
        )
    if cells.reduction == "sequence_mean" and cells.ratio != "sequence":
        return (
            "reduction: sequence_mean takes one term per sequence, and ratio: "
            f"{cells.ratio} gives one per token; write reduction: sequence_mean_token_mean"
        )
    if cells.ratio == "sequence" and cells.advantage == "gae":
        return (
            "advantage: gae gives one advantage per token, and ratio: sequence has one term per sequence; write ratio: "
            "sequence_token (the same ratio, token by token), or advantage: group_mean"
        )
    if cells.ratio == "sequence" and cells.advantage == "batch_std" and cells.kl_in_reward:
        return (
            "advantage: batch_std with a KL in the reward gives one advantage per token, and ratio: sequence has one "
            "term per sequence; write ratio: sequence_token, or kl.place: loss"
        )
    return _trust_problem(cells) or _turn_problem(cells) or _teacher_problem(cells) or _correction_problem(cells)


def _trust_problem(cells: Composition) -> str | None:
    """Of the cells of the trust region and of the product of ratios."""
    if cells.divergence is not None and cells.divergence not in get_args(Divergence):
        return f"divergence: {cells.divergence!r} is unknown; write one of {', '.join(get_args(Divergence))}"
    if cells.surrogate == "trust_region" and cells.ratio != "token":
        return (
            "surrogate: trust_region bounds the probability of each token, and ratio: "
            f"{cells.ratio} is of a whole sequence; write ratio: token"
        )
    if (cells.ratio == "product") != (cells.surrogate == "gamma_gate"):
        return (
            f"ratio: {cells.ratio} with surrogate: {cells.surrogate}: a product over an answer leaves any clip, and "
            "the gamma gate is made for it; write ratio: product and surrogate: gamma_gate together, or neither"
        )
    if cells.second_moment is not None and cells.ratio == "sequence":
        return (
            "second_moment drops single tokens, and ratio: sequence has one term per sequence; write ratio: token or "
            "sequence_token, or correction: {kind: reject} for whole answers"
        )
    return None


def _turn_problem(cells: Composition) -> str | None:
    if cells.credit == "turn" and cells.ratio == "sequence":
        return (
            "credit: turn gives each turn its own advantage, and ratio: sequence has one term per sequence; write "
            "ratio: sequence_token (the same ratio, token by token), ratio: token, or credit: episode"
        )
    if cells.credit == "turn" and cells.advantage in ("mean_relative", "batch_scaled"):
        return (
            f"advantage: {cells.advantage} is of whole conversations, and credit: turn of single turns; write "
            "advantage: group_mean, or credit: episode"
        )
    if cells.turn_gamma != 1.0 and cells.credit == "episode":
        return (
            f"turn_gamma: {cells.turn_gamma} discounts the rewards of later turns, which credit: episode does not "
            "tell apart; write credit: turn too"
        )
    if cells.turn_gamma != 1.0 and cells.advantage == "gae":
        return f"advantage: gae discounts turns by gae_gamma; write gae_gamma: {cells.turn_gamma}, and no turn_gamma"
    return None


def _teacher_problem(cells: Composition) -> str | None:
    if cells.teacher_advantage and cells.ratio in ("sequence", "product"):
        return (
            f"distillation.place: advantage gives each token its own, and ratio: {cells.ratio} has one term per "
            "sequence; write ratio: sequence_token (gspo_token) or token, or distillation.place: loss"
        )
    if not cells.reads_rewards and cells.advantage == "gae":
        return (
            "advantage: gae trains a critic on rewards, which distillation.reward: 0 does not learn from; write "
            "advantage: group_mean, or distillation.reward above 0"
        )
    if not cells.reads_rewards and cells.dynamic_sampling:
        return (
            "dynamic_sampling replaces groups whose rewards are equal, and with distillation.reward: 0 the teacher "
            "alone teaches; write dynamic_sampling: false"
        )
    return None


def _correction_problem(cells: Composition) -> str | None:
    for correction in cells.corrections:
        if cells.ratio != "token" and correction.over == "token":
            return (
                f"correction: reject over single tokens, and ratio: {cells.ratio} weighs whole sequences; write over: "
                "mean, sum or max, or ratio: token"
            )
        if cells.ratio != "token" and correction.per_token:
            return (
                f"correction: {correction.kind} weighs tokens, and ratio: {cells.ratio} weighs whole sequences; write "
                "correction: {kind: geometric_tis} (the same mean over tokens as the ratio), a sequence_* kind, or "
                "ratio: token"
            )
        if (
            correction.numerator == "current"
            and correction.kind not in MASKS_ONLY
            and cells.surrogate not in ("reinforce", "mask")
        ):
            return (
                f"correction: {correction.kind} with numerator: current puts pi/mu in front of a term that already "
                "holds pi/pi_o; write numerator: proximal, or surrogate: reinforce or mask"
            )
    weighing = [c.kind for c in cells.corrections if c.kind not in MASKS_ONLY]
    if cells.ratio_to == "rollout" and weighing:
        return (
            f"correction: {weighing[0]} weighs by a ratio to mu, which the surrogate's ratio holds already with "
            "ratio_to: rollout; write correction: [], or ratio_to: proximal"
        )
    labels = [c.label for c in cells.corrections]
    if len(set(labels)) < len(labels):
        return f"correction: {', '.join(labels)} judge the same twice; keep the narrower one"
    if len(weighing) > 1:
        return (
            "correction: more than one of them weighs the same pi_o/mu; keep one weight, and add only "
            f"{', '.join(MASKS_ONLY[:-1])} or {MASKS_ONLY[-1]} beside it"
        )
    return None
