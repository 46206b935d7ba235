"""Parts of a checkpoint that torch wrote, however their tensors lie in memory."""

import io
import pickle
import struct
import zipfile

import torch

from tests.support.ranks import run_alone


def stored():
    values = torch.arange(7 * 9, dtype=torch.float32).view(7, 9)
    return {"whole": values, "transposed": values.T, "cut out": values.bfloat16()[2:5, 1:4], "none": values[:0]}


def round_trip(path):
    import torch.distributed.checkpoint as dcp

    from megatron_ext.convert.reader import CheckpointReader
    from megatron_ext.mcore import ShardedTensor

    dcp.save(stored(), checkpoint_id=path, no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    reader = CheckpointReader(path)
    out = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored().items()}
    for name, tensor in out.items():
        reader.fill(ShardedTensor.from_rank_offsets(name, tensor))
    return {name: tensor.tolist() for name, tensor in out.items()}


def test_strides_and_offsets_of_a_saved_tensor_are_kept(tmp_path):
    (values,) = run_alone(round_trip, tmp_path)
    assert values == {name: tensor.tolist() for name, tensor in stored().items()}


def flips(tensor):
    """How often a flipped bit of a saved tensor was found, and how often it changed the tensor unseen."""
    from megatron_ext.convert.reader import saved_tensor

    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    found = unseen = 0
    directory = buffer.getvalue().index(b"PK\x01\x02")  # has no checksum: there every bit of every byte
    flipped = [(at, at % 8) for at in range(directory)]
    flipped += [(at, bit) for at in range(directory, len(buffer.getvalue())) for bit in range(8)]
    for at, bit in flipped:
        content = bytearray(buffer.getvalue())
        content[at] ^= 1 << bit
        try:
            back = saved_tensor(io.BytesIO(content))
        except (zipfile.BadZipFile, struct.error, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            found += 1
        else:
            unseen += not (back.dtype == tensor.dtype and torch.equal(back, tensor))
    return found, unseen


def test_no_flipped_bit_changes_a_tensor_unseen():
    tensor = torch.arange(60, dtype=torch.float32).view(6, 10).T
    ((found, unseen),) = run_alone(flips, tensor)
    assert found > tensor.nbytes  # padding between the records, dates and the like are harmless
    assert unseen == 0
