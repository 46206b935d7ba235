"""Objectives: from rewards and log-probs to advantages and a loss, as one composition of cells.

`resolve(ObjectiveConfig(preset="gspo"))` gives an Objective; its `advantages` and `loss` are pure tensor functions.
"""

from pipeline.objectives.composition import Composition, CorrectionConfig, KLConfig
from pipeline.objectives.config import ObjectiveConfig, resolve
from pipeline.objectives.mismatch import mismatch_by, mismatch_metrics
from pipeline.objectives.objective import AdvantageOutputs, Objective
from pipeline.objectives.presets import PRESETS, Preset
from pipeline.objectives.terms.ratios import NonFiniteRatio
from pipeline.objectives.terms.shaping import is_informative, overlong_penalty
from pipeline.objectives.types import Denominators, LossInputs, LossOutputs, Metric

__all__ = [
    "PRESETS",
    "AdvantageOutputs",
    "Composition",
    "CorrectionConfig",
    "Denominators",
    "KLConfig",
    "LossInputs",
    "LossOutputs",
    "Metric",
    "NonFiniteRatio",
    "Objective",
    "ObjectiveConfig",
    "Preset",
    "is_informative",
    "mismatch_by",
    "mismatch_metrics",
    "overlong_penalty",
    "resolve",
]
