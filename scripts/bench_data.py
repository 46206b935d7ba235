"""Seconds to start and memory of a file of many prompts: written here, opened as a run opens it, a few prompts taken.

.venv/bin/python scripts/bench_data.py                  # a million lines of JSON
.venv/bin/python scripts/bench_data.py --kind parquet --rows 100000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.config.data import DataConfig
from pipeline.config.model import TinyModelConfig
from pipeline.data.prompts import PromptSource
from pipeline.data.tiny_model import make_tiny_model

_WORDS = (
    "A shop sells {a} apples a day at {b} cents each, and twice as many on the {a}th day. What does it take in? " * 3
)


def write(folder: Path, kind: str, rows: int) -> Path:
    """The file: prompts of about 300 characters."""
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers = range(rows)
        prompts = [f"{n}: {_WORDS.format(a=n, b=n % 97)}" for n in numbers]
        pq.write_table(pa.table({"prompt": prompts, "answer": [str(n) for n in numbers]}), file)
        return file
    with file.open("w") as out:
        for n in range(rows):
            out.write(json.dumps({"prompt": f"{n}: {_WORDS.format(a=n, b=n % 97)}", "answer": str(n)}) + "\n")
    return file


def anonymous_mb() -> float:
    """Resident memory of this process that no file backs, 1e6 bytes."""
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), options.kind, options.rows)
        tiny = TinyModelConfig(tokenizer="bytes")  # pyright: ignore[reportCallIssue]
        model = make_tiny_model(Path(folder) / "model", tiny, seed=0)
        few = Path(folder) / "few.jsonl"
        few.write_text('{"prompt": "1+1", "answer": "2"}\n')
        PromptSource(DataConfig.model_validate({"path": few}), model, seed=0).take(1)  # imports, out of the figures
        if options.kind == "parquet":
            import datasets

            datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        before, start = anonymous_mb(), time.perf_counter()
        config = {"sources": [{"kind": options.kind, "path": file}], "max_prompt_tokens": 1024}
        source = PromptSource(DataConfig.model_validate(config), model, seed=0)
        opened, held = time.perf_counter() - start, anonymous_mb() - before
        start = time.perf_counter()
        source.take(512)
        took = time.perf_counter() - start
        print(
            f"{options.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB as {options.kind}: opened in {opened:.1f} s, "
            f"{held:,.0f} MB held, 512 prompts taken in {took:.2f} s"
        )


if __name__ == "__main__":
    main()
