"""How many files a run has open, and whether this user may."""

from __future__ import annotations

import resource

from pipeline.config import Config
from pipeline.errors import NOT_STARTED, SamerouteError

# Ray's raylet, a scheduler and the controller have up to 150 each, sockets to their neighbours most of them.
_EACH_PROCESS = 512
_A_RANK = 32  # in the controller and in every other rank
_ENOUGH = 65_536


class LimitError(SamerouteError):
    """A limit of this user is too low for the run; the message says what to write instead."""

    exit_code = NOT_STARTED


def files_needed(config: Config) -> int:
    """Open files of the process that has most: the controller, with a connection for each answer in flight."""
    steps = config.rollout.steps_ahead + 1
    answers = steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return _EACH_PROCESS + answers + _A_RANK * config.parallel.ranks


def raise_open_files(config: Config) -> None:
    """Allow this process, and what it starts, as many open files as the run needs.

    The soft limit, often 1024, is raised without a word. Raises LimitError where the hard one is too low.
    """
    needed = files_needed(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LimitError(
            f"ulimit -n is {hard}, and this run needs {needed} open files: raise it (ulimit -Hn {needed} as root, "
            "LimitNOFILE of a service, --ulimit nofile of a container, nofile in /etc/security/limits.conf), or sample "
            "less at a time (rollout.prompts_per_step, rollout.samples_per_prompt)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = max(needed, _ENOUGH)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(hard, wanted), hard)
        )
