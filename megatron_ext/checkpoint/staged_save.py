"""Writing a dist checkpoint while training goes on.

Planning needs every rank. Then each rank writes copies of its tensors from a thread of its own, and what describes the
whole is written by the first rank from what the others tell: no collective, so that a checkpoint can be completed while
the ranks are in the middle of a step, or hang in one. Megatron-Core (0.19.2) forks a process for the writing, which a
rank with threads (Ray's, gloo's) does not survive reliably; and a process that is forked holds the GPU's memory.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ext.checkpoint.planners import SavePlanner, torch_state
from megatron_ext.checkpoint.rank_file import RankFileWriter, Sums
from megatron_ext.mcore import (
    AsyncRequest,
    CheckpointingConfig,
    TorchDistSaveShardedStrategy,
    dist_checkpointing,
    replace_keys_with_sharded_keys,
    save_config,
    save_state_dict_async_plan,
)

Part = tuple[Sums, list[WriteResult]]


class StagedSave:
    """A save that has begun: everything is copied, a thread writes.

    Once all ranks have `written`, the first one is to `describe` their parts. All of that may be called from any
    thread; `finish` does it for ranks that do it together.
    """

    def __init__(self, state: dict[str, Any], path: Path, live: set[int], finished: Callable[[Sums], None]):
        """state: a sharded state dict. path: an empty directory. live: storages that training will change.

        finished: called on the first rank at the very end, with (bytes, CRC-32) of the files that the ranks wrote.
        """
        self.path, self._finished = path, finished
        self._writer = _Writer(path, live)
        self._strategy = _Strategy(self._writer)
        dist_checkpointing.save(state, str(path), self._strategy, async_sharded_save=True)
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

    def part(self) -> Part:
        """What the first rank has to know of this one's file, which is `written`."""
        return self._writer.sums, self._writer.retrieve_write_results()

    def describe(self, parts: Sequence[Part]) -> None:
        """On the first rank, with the parts of all: write what describes all files."""
        metadata = self._strategy.metadata
        assert metadata is not None
        self._writer.finish(metadata, [results for _, results in parts])
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self.path))
        self._finished({name: s for sums, _ in parts for name, s in sums.items()})

    def finish(self) -> None:
        """All ranks together, when every one has `written`."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.part())
        if dist.get_rank() == 0:
            self.describe(everyone)
        dist.barrier()


class _Strategy(TorchDistSaveShardedStrategy):
    """Plans, copies and leaves the writing to a thread."""

    def __init__(self, writer: _Writer):
        super().__init__()
        self.writer = writer
        self.metadata: Metadata | None = None  # of the whole, on the first rank

    def async_save(self, sharded_state_dict, checkpoint_dir, async_strategy="mcore"):
        state, _, _ = replace_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planned, *_ = save_state_dict_async_plan(torch_state(state), self.writer, None, planner=SavePlanner())
        self.metadata = planned[1]
        return AsyncRequest(None, (), [])


class _Writer(RankFileWriter):
    """Values are copied when they are planned, and written in a thread."""

    can_run_decentralized_global_plan = False

    def __init__(self, path: Path, live: set[int]):
        super().__init__(path)
        self.live = live
        self.sums: Sums = {}
        self._items: deque[tuple[Any, Tensor | io.BytesIO]] = deque()
        self._results: list[WriteResult] = []

    def prepare_write_data(self, plan, planner) -> None:
        """Copy what training will change."""
        self._name = self.name_of(plan)
        self._items = deque((item, self._kept(data)) for item, data in self.resolved(plan, planner))

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
            yield self._items.popleft()

    def retrieve_write_results(self) -> list[WriteResult]:
        return self._results
