"""What grades the answers of a run: verifiers with weights, and what becomes of answers that one fails on."""

from pipeline.config.rewards.listed import (
    KINDS,
    MOVED,
    GradingConfig,
    OnFailure,
    RewardConfig,
    Rewards,
    check_memory,
    check_sources,
    what_lacks,
)
from pipeline.config.rewards.verifiers import (
    CodeReward,
    ExactMatchReward,
    FunctionReward,
    JudgeReward,
    Reward,
    RewardModelReward,
    SandboxConfig,
)

__all__ = [
    "KINDS",
    "MOVED",
    "CodeReward",
    "ExactMatchReward",
    "FunctionReward",
    "GradingConfig",
    "JudgeReward",
    "OnFailure",
    "Reward",
    "RewardConfig",
    "RewardModelReward",
    "Rewards",
    "SandboxConfig",
    "check_memory",
    "check_sources",
    "what_lacks",
]
