"""Hugging Face names and shapes on one side, Megatron-Core's shards on the other.

- `transforms.py`: how one tensor is joined and split.
- `tables.py`:     which transform carries which name, a family at a time.
- `load.py`:       a model directory into this rank's shards.
- `export.py`:     all ranks' shards into a stream of Hugging Face tensors.
"""
