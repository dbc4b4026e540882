"""The files of a board's folder that has no mmchat.json: what people have who converted the model for other programs.

The community's conversions are named qwen.rkllm and vision_transformer.rknn; one file of a kind may have any name.
The embedding table is whichever safetensors file has it, a shard of the published checkpoint included.

Only which files there are is known here; mmchat.model_dir says what they must be.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mmchat.checkpoint import read_header
from mmchat.errors import ModelDirError

_NAMES = {".rkllm": "qwen.rkllm", ".rknn": "vision_transformer.rknn"}
_TABLE = "embed_tokens.weight"
_PART_BYTES = 1 << 20


def board_files(folder: Path) -> dict[str, Path | None] | None:
    """ "llm", "embed_table" and "vision" -> file, None where there is none; None where it is no board's folder.

    A whole checkpoint with a *.rkllm but no encoder beside it is taken for the checkpoint that it is.

    Raises ModelDirError: several files of a kind, or a damaged one.
    """
    llm, vision = _one(folder, ".rkllm"), _one(folder, ".rknn")
    if llm is None:
        return None
    tensors = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    if vision is None and any(name.startswith("vpm.") for names in tensors.values() for name in names):
        return None
    tables = [path for path, names in tensors.items() if any(name.endswith(_TABLE) for name in names)]
    if len(tables) > 1:
        raise ModelDirError(f"{folder}: {' and '.join(path.name for path in tables)} have an embedding table; keep one")
    return {"llm": llm, "embed_table": tables[0] if tables else None, "vision": vision}


def _one(folder: Path, suffix: str) -> Path | None:
    """The file of that kind; of several, the one of the usual name."""
    found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
    usual = [path for path in found if path.name == _NAMES[suffix]]
    if len(found) > 1 and not usual:
        names = ", ".join(path.name for path in found)
        raise ModelDirError(f"{folder}: has several *{suffix} ({names}); keep one, or name it {_NAMES[suffix]}")
    return next(iter(usual or found), None)


def file_mark(path: Path) -> str:
    """What tells a file apart from others without reading 8 GB: SHA-256 over its size, first and last MiB."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_PART_BYTES)
        file.seek(max(0, size - _PART_BYTES))
        return hashlib.sha256(f"{size} ".encode() + head + file.read(_PART_BYTES)).hexdigest()
