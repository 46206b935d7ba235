"""The command `sameroute`, also as `python -m sameroute`. It finds its own packages whatever lies on PYTHONPATH.

The packages are called `pipeline` and `megatron_ext`. Somebody's own `pipeline.py` in a folder of PYTHONPATH, or in the
folder that Python was started in, would be found before them, by this process and by all that it starts.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_PACKAGES = ("pipeline", "megatron_ext")


def own_packages_first() -> None:
    """Put the folder of the packages in front of the path, here and for child processes, where another module hides
    one of them. Where none does the path stays as it is."""
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name)
        if spec is not None and (spec.origin is None or not Path(spec.origin).resolve().is_relative_to(_ROOT / name)):
            sys.path.insert(0, str(_ROOT))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
            return


def main() -> int:
    """See pipeline.commands.main."""
    own_packages_first()
    from pipeline.commands.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
