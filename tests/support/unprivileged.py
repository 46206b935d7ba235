"""A command as another user than root, who can read this Python and nothing else of root's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NOBODY = 65534


def as_nobody(words, *, namespaces=True):
    """The words of the same command for a user without rights; as any other user than root, the command itself.

    Where root's home hides the Python, an empty one is mounted over it, and the Python in it, for this command alone.
    namespaces: False lets it make no user namespaces.
    """
    around = ["bwrap", "--dev-bind", "/", "/", "--die-with-parent"]
    if os.geteuid() == 0:
        prefix = Path(sys.base_prefix).resolve()
        hidden = [parent for parent in prefix.parents if not parent.stat().st_mode & 0o001]
        if hidden:
            around += ["--perms", "0755", "--tmpfs", str(hidden[-1])]
            below = [parent for parent in reversed(prefix.parents) if parent.is_relative_to(hidden[-1])]
            around += [word for parent in below[1:] for word in ("--perms", "0755", "--dir", str(parent))]
            around += ["--ro-bind", str(prefix), str(prefix)]
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    else:
        user = []
    limited = [] if namespaces else ["bwrap", "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--"]
    if not user and namespaces:
        return list(words)
    return [*around, "--", *user, *limited, *words] if user else [*limited, *words]
