"""The trainer's weights to the servers, and the proof that they arrived.

`sender.py` holds the protocol, `further_sender.py` what ranks beside the first do, `transports.py` the two ways that
bytes take, `differences.py` the comparison by name.
"""

from pipeline.config.weights import WeightsConfig
from pipeline.weights.board import Meeting
from pipeline.weights.differences import WeightDifference, weight_differences
from pipeline.weights.further_sender import FurtherSender
from pipeline.weights.sender import WeightSender
from pipeline.weights.servers import WeightTransferError

__all__ = [
    "FurtherSender",
    "Meeting",
    "WeightDifference",
    "WeightSender",
    "WeightTransferError",
    "WeightsConfig",
    "weight_differences",
]
