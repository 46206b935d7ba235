"""Hugging Face names and shapes on one side, Megatron-Core's shards on the other.

- `transforms.py`: how one tensor is joined and split.
- `tables.py`:     which transform carries which name: the rows that families share.
- `families/`:     a model family a file: its table, and its fields of Megatron-Core's config.
- `load.py`:       a model directory into this rank's shards.
- `export.py`:     all ranks' shards into a stream of Hugging Face tensors.
"""
