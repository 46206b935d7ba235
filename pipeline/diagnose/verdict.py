"""The sentence a diagnosis ends in: the largest part of the gap, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.diagnose.diagnosis import Diagnosis
    from pipeline.diagnose.exchanges import Trial

_AVOIDABLE = 0.1  # a part is told of within the bound where it leaves at most this share of the gap


def verdict(found: Diagnosis, config: Config) -> str:
    """found: everything but its sentence."""
    gap = f"mean |log pi_o - log mu| is {found.gap['abs_logprob']:.1e} nats on {found.tokens:,} tokens"
    within = found.gap["abs_logprob"] <= found.bound
    bound = f"{gap}, {'within' if within else 'beyond'} the bound of {found.bound:.0e}"
    if found.gap["nonfinite"]:
        return f"The engines disagree: {found.gap['nonfinite']:g} of {found.tokens:,} log-ratios are not finite."
    largest = found.findings[0] if found.findings else None
    if found.weights:
        return f"The engines hold different weights: {_names(found.weights)}; {bound}. {_RESEND}"
    if within and found.calibration is not None and found.calibration.off:
        return f"The server does not sample from the distribution whose log-probs it returns: {_mask(found)}"
    if within and (largest is None or largest.abs_logprob > _AVOIDABLE * found.gap["abs_logprob"]):
        agree = f"The engines agree: {bound}, the largest on any token {found.gap['max_abs_logprob']:.1e}."
        return agree if largest is None else f"{agree} {_share(found, largest)}. {_change(largest, config)}"
    if largest is None:
        return (
            f"The engines disagree: {bound}, and no part that can be exchanged takes much of it away: what is left is "
            f"attention and the rest. {_REST}"
        )
    state = "The engines agree, but not as well as they could" if within else "The engines disagree"
    text = f"{state}: {bound}. {_share(found, largest)}. {_change(largest, config)}"
    for also in found.findings[1:]:
        text += f" Of what is then left, most goes when {also.exchanged} ({also.abs_logprob:.1e} nats remain)."
    return text


def _share(found: Diagnosis, trial: Trial) -> str:
    share = 1 - trial.abs_logprob / found.gap["abs_logprob"]
    return (
        f"The largest part is {trial.part}: {min(share, 0.999):.1%} of the gap goes when {trial.exchanged} "
        f"({trial.abs_logprob:.1e} nats remain)"
    )


def _change(trial: Trial, config: Config) -> str:
    """What to change for the part."""
    setting = trial.setting
    match trial.part:
        case "tokens and labels":
            if setting.label_shift:
                return "The trainer scores another token than the one that was sampled: mend how labels are made."
            return "Log-probs and tokens are misaligned by one on their way from the server: mend that."
        case "temperature":
            return (
                f"The engines divide the logits by different temperatures, and the run's is "
                f"{config.precision.temperature:g}: give both the same."
            )
        case "sampling mask":
            return (
                "The server's log-probs are over the whole vocabulary, the trainer's over the tokens that the sampler "
                "kept: let both be over the same (precision.top_k, top_p, min_p)."
            )
        case "LM head":
            return "The engines round the logits differently: give both LM heads the same precision (precision.head)."
        case "routing":
            if setting.routes == "rollout":
                return "The engines choose different experts: set replay=r3."
            if setting.routes == "rescored":
                return (
                    "The routes that came with the rollouts are not those of their tokens: mend how routes travel from "
                    "the server's answer to the sample."
                )
            return "The replayed routes are not the ones that the server took: set replay=none until that is mended."
        case "rotary embedding":
            return (
                "The engines rotate positions by different angles: give both the same rope_theta (config.json of the "
                "served model, server.extra_args)."
            )
        case "sampling":
            return (
                "What the server answered while it sampled is not what it says of the same tokens now: the tokens were "
                "sampled under older weights, or decoding rounds more (KV-cache dtype, attention backend) than prefill."
            )
        case _:
            return f"The server held other weights than the trainer. {_RESEND}"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _mask(found: Diagnosis) -> str:
    assert found.calibration is not None
    c = found.calibration
    way = (
        "so that it leaves out, or seldom draws, tokens that it calls probable enough: look for top_p, top_k, min_p, a "
        "penalty, or another temperature on its side (generation_config.json, server.extra_args)"
        if c.difference < 0
        else "so that it draws improbable tokens too often: look for another temperature or a logit bias on its side"
    )
    return (
        f"the sampled tokens' mean surprisal is {c.difference:+.3f} nats off the entropy (standard error "
        f"{c.error:.3f}), {way}."
    )


_RESEND = "Look at the last weight transfer: a name that the server did not know, or a bucket that did not arrive."
_REST = (
    "Compare the models' config.json (attention scale, norms, rotary scaling, gate activation) and the attention "
    "backends; positions and layers in the diagnosis say where it begins."
)
