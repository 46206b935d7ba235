"""Why trainer and rollout engine disagree: the gap between their log-probs, taken apart by exchanging one part at a
time."""

from pipeline.diagnose.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
