"""What the server that forks the ranks imports once, for all of them."""

import gc

import torch._dynamo  # noqa: F401  (the first operator on the meta device asks for it: 2 s)

import megatron_ext.attention
import megatron_ext.cpu.spec
import megatron_ext.trainer  # noqa: F401

gc.freeze()  # no rank looks through it for garbage, which would also copy its pages
