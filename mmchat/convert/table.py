"""A checkpoint's embedding table -> a safetensors file of its own, in the type that the checkpoint has."""

from __future__ import annotations

from pathlib import Path

from mmchat.checkpoint import Checkpoint
from mmchat.convert.step import COPIED_BYTES_PER_S, Estimate, Progress
from mmchat.embed_table import build_table, find_table
from mmchat.errors import ModelDirError
from mmchat.outputs import check_space, only_writer, remove_temporary

_MEMORY = 100_000_000  # Python, numpy and a few blocks


def plan(source: Path, target: Path) -> Estimate:
    """Raises ModelDirError: no table in the checkpoint, or a target that would overwrite it."""
    checkpoint = Checkpoint(source)
    name = find_table(checkpoint)
    if target.is_dir():
        raise ModelDirError(f"{target}: a folder; give the file to write, for example {target / 'table.safetensors'}")
    if target.exists() and any(target.samefile(checkpoint.file(name).path) for name in checkpoint):
        raise ModelDirError(f"{target}: one of the checkpoint's own files; give another name")
    info = checkpoint.info(name)
    n_bytes = info.end - info.start
    return Estimate(n_bytes, n_bytes, _MEMORY, n_bytes / COPIED_BYTES_PER_S)


def run(source: Path, target: Path, progress: Progress) -> None:
    """Write the table.  Interrupted, it begins anew: a gigabyte takes seconds.

    Raises ModelDirError as plan does, and for values that are not finite; DiskFull.
    """
    estimate = plan(source, target)
    with only_writer(target.parent):
        remove_temporary(target)
        check_space(target.parent, estimate.writes)
        build_table(source, target, lambda done, total: progress(target.name, done, total))
