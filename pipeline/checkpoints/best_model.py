"""The best model of a run, where its user wants it: a directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoints.store import CheckpointError
from pipeline.errors import NOT_STARTED, SamerouteError

HUB = "hub:"


class ExportError(SamerouteError):
    """The best model cannot go where checkpoint.best.export says."""

    exit_code = NOT_STARTED


def check_export(where: str, model: Path | None, run: Path) -> None:
    """Raise ExportError for what can be known to fail before anything starts. model: that the run begins with; run: its
    directory. An export replaces a whole directory, and neither of these."""
    if where.startswith(HUB):
        from huggingface_hub import get_token

        if where.count("/") != 1:
            raise ExportError(f"checkpoint.best.export={where}: write {HUB}OWNER/NAME")
        if not get_token():
            raise ExportError(f"checkpoint.best.export={where} needs a token: set HF_TOKEN, or export to a path")
        return
    target = Path(where)
    if target.resolve() in (run.resolve(), *run.resolve().parents):
        raise ExportError(f"checkpoint.best.export={where} would replace run.directory={run}; take another path")
    if model is not None and target.resolve() in (model.resolve(), *model.resolve().parents):
        raise ExportError(f"checkpoint.best.export={where} would replace model.path={model}; take another path")
    if target.exists() and not (target / "config.json").is_file():
        raise ExportError(f"checkpoint.best.export={where} is there and holds no model; take another path")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        raise ExportError(f"checkpoint.best.export={where}: {folder} cannot be written: {error.strerror}") from error


def export_best(where: str, run: Path, save_hf: Callable[[Path], None], companions: Callable[[Path], object]) -> str:
    """Write the model, replacing the last best one once this is whole; a line that says so.

    run: its directory. save_hf: writes weights into a directory that exists; companions: all else of a model.
    Raises CheckpointError where it cannot be written; what a hub refuses is the line, and the run goes on.
    """
    target = run / "best_hf" if where.startswith(HUB) else Path(where)
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        companions(partial)
        save_hf(partial)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise CheckpointError(f"the best model was not exported to {target}: {error}") from error
    return _push(where.removeprefix(HUB), target) if where.startswith(HUB) else f"best model: {target}"


def _push(repository: str, folder: Path) -> str:
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (httpx.HTTPError, OSError) as error:  # the hub's answers are such errors too
        return f"the best model is in {folder}, and was not pushed to {repository}: {error}"
    return f"best model: {repository} on the hub"
