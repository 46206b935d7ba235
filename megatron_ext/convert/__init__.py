"""Hugging Face model directories and Megatron-Core checkpoints, one into the other.

- `tensors.py`: what is read and what is written, a tensor at a time.
- `ranks.py`:   the ranks of a layout as processes of this machine.
- `command.py`: `sameroute convert`: checks, output directory, progress, ranks, comparison.
"""
