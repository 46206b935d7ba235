"""The trainer's weights to the servers, and the proof that they arrived.

`sender.py` holds the protocol, `further_sender.py` what ranks beside the first do, `transports.py` the two ways that
bytes take, `differences.py` the comparison by name, `all_finite.py` what may not be sent.
"""

from pipeline.config.weights import WeightsConfig
from pipeline.weights.all_finite import FiniteWeights, NotFiniteWeightsError
from pipeline.weights.board import Meeting
from pipeline.weights.differences import WeightDifference, weight_differences
from pipeline.weights.further_sender import FurtherSender
from pipeline.weights.sender import WeightSender
from pipeline.weights.servers import WeightTransferError

__all__ = [
    "FiniteWeights",
    "FurtherSender",
    "Meeting",
    "NotFiniteWeightsError",
    "WeightDifference",
    "WeightSender",
    "WeightTransferError",
    "WeightsConfig",
    "weight_differences",
]
