"""Verifiers: from a prompt and a response to a number, in processes that can be killed."""

from pipeline.rewards import exact_match as _exact_match  # noqa: F401  registers itself
from pipeline.rewards import gym_score as _gym_score  # noqa: F401  registers itself
from pipeline.rewards.grade import Failures, grade, response_text
from pipeline.rewards.grader import Grader, check_reward, open_grader
from pipeline.rewards.protocol import Limits, Question, Verdict
from pipeline.rewards.registry import RewardError, RewardFunction, VerifierError, register_reward, resolve_reward

__all__ = [
    "Failures",
    "Grader",
    "Limits",
    "Question",
    "RewardError",
    "RewardFunction",
    "Verdict",
    "VerifierError",
    "check_reward",
    "grade",
    "open_grader",
    "register_reward",
    "resolve_reward",
    "response_text",
]
