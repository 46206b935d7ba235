"""Hugging Face names and shapes on one side, Megatron-Core's shards on the other.

- `config_json.py`: what stands in a config.json; `description.py` makes one object of it, which everybody takes.
- `transforms.py`: how one tensor is joined and split.
- `tables.py`:     which transform carries which name: the rows that families share.
- `families/`:     a model family a file: its table, its fields of Megatron-Core's config, what both engines do of their
                   own accord for it.
- `load.py`:       a model directory into this rank's shards.
- `export.py`:     all ranks' shards into a stream of Hugging Face tensors.
"""
