"""What the trainer is given of a rollout."""

from __future__ import annotations

import numpy as np

from megatron_ext.batch.layout import Sample
from pipeline.types import Rollout


def to_sample(rollout: Rollout) -> Sample:
    """A rollout as the trainer reads it, its routes and kept tokens beside it."""
    tokens = rollout.token_ids.astype(np.int32)
    return Sample(tokens, len(rollout.prompt_ids), routes=rollout.routes, kept=rollout.kept, trained=rollout.trained)
