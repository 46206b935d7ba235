"""Our names in a checkpoint directory, and the error of one that cannot be read. Neither torch nor Megatron is here."""

CHECKSUMS = "checksums.json"
"""Bytes and CRC-32 of every file that the ranks of a training checkpoint wrote."""
HF_FOLDER = "hf"
"""The files of the Hugging Face model that are no weights."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or is another model's; the message names what."""
