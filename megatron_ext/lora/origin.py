"""Which model adapters belong to, and how they are added to it: `lora.json` of a checkpoint."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import LoraConfig

LORA = "lora.json"
_SAMPLES, _SAMPLE = 256, 1 << 14  # pieces of a file, and bytes of one


@dataclass(frozen=True)
class Origin:
    """lora: what the adapters are. base: the model directory. fingerprint: of its weights."""

    lora: LoraConfig
    base: Path
    fingerprint: str


def origin_of(base: Path, lora: LoraConfig) -> Origin:
    """Of adapters on a model directory."""
    return Origin(lora, base.resolve(), fingerprint(base))


def fingerprint(directory: Path) -> str:
    """CRC-32 of the headers and of pieces all over the weights' files: a model that was trained further has another
    one, at the cost of a few megabytes a file."""
    crc = 0
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(8)
            crc = zlib.crc32(header + stream.read(int.from_bytes(header, "little")), crc)
            for number in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
                crc = zlib.crc32(stream.read(_SAMPLE), crc)
    return f"{crc:08x}"


def write_origin(checkpoint: Path, origin: Origin) -> None:
    """Into a checkpoint directory. Raises OSError."""
    tree = origin.lora.model_dump(mode="json") | {"base": str(origin.base), "fingerprint": origin.fingerprint}
    (checkpoint / LORA).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_origin(checkpoint: Path) -> Origin | None:
    """Of a checkpoint; None where it holds a whole model. Raises ValueError where it is damaged."""
    file = checkpoint / LORA
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        base, found = Path(tree.pop("base")), tree.pop("fingerprint")
        return Origin(LoraConfig.model_validate(tree), base, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
