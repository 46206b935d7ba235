"""What the server that forks the ranks imports once, for all of them."""

import gc
import importlib

# torch's compiler: the first operator on the meta device asks for it, which takes 2 s
for module in (
    "megatron_ext.trainer",
    "megatron_ext.model.attention",
    "megatron_ext.model.torch_spec",
    "torch._dynamo",
):
    importlib.import_module(module)

gc.freeze()  # no rank looks through it for garbage, which would also copy its pages
