"""Writing a dist checkpoint while training goes on.

Planning needs every rank, and so does the metadata at the end; in between each rank writes copies of its tensors from a
thread of its own. Megatron-Core (0.19.2) forks a process for that, which a rank with threads (Ray's, gloo's) does not
survive reliably; and a process that is forked holds the GPU's memory.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ext.checkpoint.rank_file import RankFileWriter, Sums
from megatron_ext.checkpoint.shards import SavePlanner
from megatron_ext.mcore import (
    AsyncRequest,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    mcore_to_pyt_state_dict,
    replace_keys_with_sharded_keys,
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)


class StagedSave:
    """A save that has begun: everything is copied, a thread writes. `written`, then `finish` on all ranks together."""

    def __init__(self, state: dict[str, Any], path: Path, live: set[int], finished: Callable[[Sums], None]):
        """state: a sharded state dict. path: an empty directory. live: storages that training will change.

        finished: called on the first rank at the very end, with (bytes, CRC-32) of the files that the ranks wrote.
        """
        self._writer, self._finished = _Writer(path, live), finished
        request = dist_checkpointing.save(state, str(path), _Strategy(self._writer), async_sharded_save=True)
        self._finalize = request.finalize_fns
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            self._writer.write()
        except Exception as error:  # raised where the trainer asks; without one the file would count as written
            self._error = error

    def written(self, *, wait: bool = False) -> bool:
        """Whether this rank's file is on the disk. Raises what the thread raised."""
        if wait:
            self._thread.join()
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def finish(self) -> None:
        """Write what describes all files. Every rank has `written`."""
        for function in self._finalize:
            function()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._writer.sums)
        if dist.get_rank() == 0:
            self._finished({name: s for sums in everyone for name, s in sums.items()})


class _Strategy(TorchDistSaveShardedStrategy):
    """Plans, copies and leaves the writing to a thread."""

    def __init__(self, writer: _Writer):
        super().__init__()
        self.writer = writer

    def async_save(self, sharded_state_dict, checkpoint_dir, async_strategy="mcore"):
        state, _, _ = replace_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        pytorch = mcore_to_pyt_state_dict(state)
        planned, *_ = save_state_dict_async_plan(pytorch, self.writer, None, planner=SavePlanner())
        return AsyncRequest(None, (), [lambda: save_state_dict_async_finalize(*planned)])


class _Writer(RankFileWriter):
    """Values are copied when they are planned, and written in a thread."""

    can_run_decentralized_global_plan = False

    def __init__(self, path: Path, live: set[int]):
        super().__init__(path)
        self.live = live
        self.sums: Sums = {}
        self._items: list[tuple[Any, Tensor | io.BytesIO]] = []
        self._results: list[WriteResult] = []

    def prepare_write_data(self, plan, planner) -> None:
        """Copy what training will change."""
        self._name = self.name_of(plan)
        self._items = [(item, self._kept(data)) for item, data in self.resolved(plan, planner)]

    def _kept(self, data: Tensor | io.BytesIO) -> Tensor | io.BytesIO:
        if not isinstance(data, Tensor):
            return data
        shared = data.device.type == "cpu" and data.untyped_storage().data_ptr() in self.live
        return data.clone() if shared else data.cpu()

    def write(self) -> None:
        """Raises OSError. A copy is let go once it is written."""
        if self._items:
            self._results = self.write_items(self._name, self._drained(), self.sums)

    def _drained(self) -> Iterator[tuple[Any, Tensor | io.BytesIO]]:
        while self._items:
            yield self._items.pop(0)

    def retrieve_write_results(self) -> list[WriteResult]:
        return self._results
