"""Verifiers: from a prompt and a response to a number, in processes that can be killed."""

from pipeline.rewards.grade import Failures, grade, question, response_text, settle, text_of
from pipeline.rewards.grader import Grader, check_rewards, open_grader
from pipeline.rewards.open_questions import Asking
from pipeline.rewards.protocol import Limits, Question, Verdict
from pipeline.rewards.registry import Component, RewardError, Verifier, VerifierError

__all__ = [
    "Asking",
    "Component",
    "Failures",
    "Grader",
    "Limits",
    "Question",
    "RewardError",
    "Verdict",
    "Verifier",
    "VerifierError",
    "check_rewards",
    "grade",
    "open_grader",
    "question",
    "response_text",
    "settle",
    "text_of",
]
