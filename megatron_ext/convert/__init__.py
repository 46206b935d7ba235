"""Hugging Face model directories and Megatron-Core checkpoints, one into the other; and a dense model into experts.

- `comparison.py`: what was written beside what it was made from.
- `tensors.py`: what is read and what is written, a tensor at a time.
- `ranks.py`:   the ranks of a layout as processes of this machine.
- `conversion.py`: `sameroute convert`: checks, output directory, progress, ranks, comparison.
- `upcycling.py`: `sameroute upcycle`: the tensors and the config.json of the sparse model.
"""
