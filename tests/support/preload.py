"""What the server that forks the ranks imports once, for all of them."""

import importlib

from pipeline.imports import lasting_imports

with lasting_imports():  # no rank looks through it for garbage, which would also copy its pages
    # torch's compiler: the first operator on the meta device asks for it, which takes 2 s
    for module in ("trainer", "model.attention", "model.torch_spec"):
        importlib.import_module(f"megatron_ext.{module}")
    importlib.import_module("torch._dynamo")
