"""Conversations of many turns, led by what a person writes."""

from pipeline.environments.conversation import Conversation, LimitReached, Misuse, Turn
from pipeline.environments.reward import Environment, Reward

__all__ = ["Conversation", "Environment", "LimitReached", "Misuse", "Reward", "Turn"]
