"""Packages that are not there, or do not load here, of which every name imports."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
from unittest.mock import MagicMock


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder for `sys.meta_path`. packages: by their first names."""

    def __init__(self, *packages: str):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        made = MagicMock(name=spec.name)
        made.__spec__, made.__path__, made.__name__, made.__version__ = spec, [], spec.name, "9.9"
        return made

    def exec_module(self, module):
        pass
