"""The trainer's weights to the servers, and the proof that they arrived.

`sender.py` holds the protocol, `transports.py` the two ways that bytes take, `differences.py` the comparison by name,
`rounding.py` what a quantised server is sent.
"""

from pipeline.weights.differences import WeightDifference, weight_differences
from pipeline.weights.rounding import rounded
from pipeline.weights.sender import WeightSender, WeightTransferError

__all__ = ["WeightDifference", "WeightSender", "WeightTransferError", "rounded", "weight_differences"]
