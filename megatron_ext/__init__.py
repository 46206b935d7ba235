"""Megatron-Core as a trainer: load, log-probs of a batch, update on a batch, export Hugging Face weights.

Knows Megatron and nothing of rewards, prompts, Ray or HTTP. Importing this package is cheap; the first import of
`megatron_ext.mcore` loads Megatron-Core (3 to 6 seconds) and, where there is no GPU, prepares it for the CPU.
"""
