"""What the server that forks the ranks imports once, for all of them."""

import functools
import importlib
import importlib.metadata

from pipeline.imports import lasting_imports

_MODULES = (
    "megatron_ext.trainer",
    "megatron_ext.model.attention",
    "megatron_ext.model.torch_spec",
    "megatron_ext.cpu.row_loops",  # numba
    "megatron.core.models.mimo.optimizer",  # the first optimizer asks for it
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "torch.utils.serialization.config",
    "torch._dynamo",  # torch's compiler: the first operator on the meta device asks for it, which takes 2 s
    "pytest",  # a rank imports the file of its function
    "pipeline.loop.update",
    "pipeline.trainer.group",
)

with lasting_imports():  # no rank looks through it for garbage, which would also copy its pages
    for name in _MODULES:
        importlib.import_module(name)

# torch.distributed reads the metadata of all 300 packages for each process that makes a group
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
importlib.metadata.entry_points(group="torch.distributed.backends")
