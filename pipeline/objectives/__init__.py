"""Objectives: from rewards and log-probs to advantages and a loss, as one composition of cells.

`resolve(ObjectiveConfig(preset="gspo"))` gives an Objective; its `advantages` and `loss` are pure tensor functions.

Names are imported when they are asked for: what a person writes (config, composition, presets, describe) needs no
torch, and a command that only reads it should not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.objectives.bad_samples import BadSamples, NonFiniteInput, NonFiniteRatio, RunawayRatio
    from pipeline.objectives.composition import Composition, KLConfig
    from pipeline.objectives.config import ObjectiveConfig
    from pipeline.objectives.correction_config import CorrectionConfig
    from pipeline.objectives.mismatch import mismatch_by, mismatch_metrics
    from pipeline.objectives.objective import AdvantageOutputs, Objective, resolve
    from pipeline.objectives.presets import PRESETS, Preset
    from pipeline.objectives.terms.shaping import is_informative, overlong_penalty
    from pipeline.objectives.terms.turns import Turns
    from pipeline.objectives.types import Denominators, LossInputs, LossOutputs, Metric

_HOMES = {
    "composition": ("Composition", "KLConfig"),
    "config": ("ObjectiveConfig",),
    "correction_config": ("CorrectionConfig",),
    "bad_samples": ("BadSamples", "NonFiniteInput", "NonFiniteRatio", "RunawayRatio"),
    "mismatch": ("mismatch_by", "mismatch_metrics"),
    "objective": ("AdvantageOutputs", "Objective", "resolve"),
    "presets": ("PRESETS", "Preset"),
    "terms.shaping": ("is_informative", "overlong_penalty"),
    "terms.turns": ("Turns",),
    "types": ("Denominators", "LossInputs", "LossOutputs", "Metric"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PRESETS",
    "AdvantageOutputs",
    "BadSamples",
    "Composition",
    "CorrectionConfig",
    "Denominators",
    "KLConfig",
    "LossInputs",
    "LossOutputs",
    "Metric",
    "NonFiniteInput",
    "NonFiniteRatio",
    "Objective",
    "ObjectiveConfig",
    "Preset",
    "RunawayRatio",
    "Turns",
    "is_informative",
    "mismatch_by",
    "mismatch_metrics",
    "overlong_penalty",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
