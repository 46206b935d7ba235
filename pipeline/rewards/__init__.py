"""Verifiers: from a prompt and a response to a number."""

from pipeline.rewards import exact_match as _exact_match  # noqa: F401  registers itself
from pipeline.rewards.grade import grade, response_text
from pipeline.rewards.registry import RewardError, RewardFunction, register_reward, resolve_reward

__all__ = ["RewardError", "RewardFunction", "grade", "register_reward", "resolve_reward", "response_text"]
