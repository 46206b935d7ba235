"""The NCCL variables that both engines must agree on.

The trainer's rank 0 and all server ranks form one NCCL group, in which weights travel. SGLang 0.5.23 sets two variables
in its own processes where they are unset (`_set_envs_and_config` in sglang/srt/entrypoints/engine.py); a trainer rank
that has not set them the same way shares buffers in another manner, and the group fails on one machine. So the values
are decided here, once, and given to every process of both engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# The flags of SGLang that switch a variable on, whatever the environment says.
_SWITCHED_ON_BY = {
    "NCCL_CUMEM_ENABLE": ("--enable-symm-mem",),
    "NCCL_NVLS_ENABLE": ("--enable-nccl-nvls", "--enable-symm-mem"),
}
_LONGER_THAN = len("--enable-")


def nccl_environment(environment: Mapping[str, str], server_arguments: Iterable[str]) -> dict[str, str]:
    """NCCL's variables for trainer ranks and servers, the values that SGLang would end with.

    environment: of this process. A value that somebody set there counts for both engines. server_arguments: further
    arguments of SGLang's command line.
    """
    flags = [argument.partition("=")[0] for argument in server_arguments]

    def given(known: str) -> bool:
        # argparse takes an unambiguous beginning for the whole
        return any(len(flag) > _LONGER_THAN and known.startswith(flag) for flag in flags)

    return {
        name: "1" if any(given(flag) for flag in switches) else environment.get(name, "0")
        for name, switches in _SWITCHED_ON_BY.items()
    }
