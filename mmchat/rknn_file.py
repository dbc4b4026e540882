"""What a *.rknn file tells about its model, without rknn-toolkit: chips, inputs, outputs.

The container is a signature, a version and the data's size (8 bytes each), 40 bytes of nothing from version 2 on, the
data, then JSON with its size before it.  Seen in files that rknn-toolkit2 2.5.0 wrote for rk3588 and rk3576 (version
6); what readers of older files do agrees.  An encrypted file tells nothing.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmchat.errors import ModelDirError

_HEAD = struct.Struct("<8sQQ")
_PADDING_BYTES = 40
_MAX_JSON_BYTES = 16 << 20
_CONTAINERS = range(1, 7)


@dataclass(frozen=True)
class RknnFile:
    """chips: as in "rk3588".  toolkit: the version that wrote it.  inputs, outputs: (name, shape), in the file's order.

    Empty is what the file does not tell.
    """

    chips: tuple[str, ...] = ()
    toolkit: str = ""
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


def read_rknn(path: Path) -> RknnFile:
    """Raises ModelDirError: not an RKNN model, or cut off."""
    try:
        with path.open("rb") as file:
            values = _json(file, path)
    except OSError as error:
        raise ModelDirError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        tensors = {one["tensor_id"]: (str(one["url"]), tuple(map(int, one["size"]))) for one in values["norm_tensor"]}
        sides: dict[str, dict[int, tuple[str, tuple[int, ...]]]] = {"input": {}, "output": {}}
        for edge in values["graph"]:
            if edge["right"] == "norm_tensor":
                sides[edge["left"]][int(edge["left_tensor_id"])] = tensors[edge["right_tensor_id"]]
        inputs, outputs = (tuple(sides[side][i] for i in sorted(sides[side])) for side in ("input", "output"))
        chips = tuple(str(chip).lower() for chip in values["target_platform"])
        return RknnFile(chips, str(values.get("version", "")), inputs, outputs)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return RknnFile()


def _json(file: IO[bytes], path: Path) -> dict[str, Any]:
    """The JSON at the end; {} where the container is another, or encrypted."""
    head, size = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
    if b"RKNN" not in head[:8]:  # at 4 in flatbuffers, and after CYPT
        raise ModelDirError(f"{path}: is no RKNN model (it begins with {head[:8]!r}); copy the encoder again")
    if not head.startswith(b"RKNN\0\0\0\0") or len(head) < _HEAD.size:
        return {}
    _, container, n_data = _HEAD.unpack(head)
    if container not in _CONTAINERS:
        return {}
    at = _HEAD.size + (_PADDING_BYTES if container > 1 else 0) + n_data
    if at + 8 > size:
        raise ModelDirError(f"{path}: cut off: its header tells of {at} bytes and more, it has {size}; copy it again")
    file.seek(at)
    (n_json,) = struct.unpack("<Q", file.read(8))
    if at + 8 + n_json > size:
        raise ModelDirError(f"{path}: cut off: it lacks the last {at + 8 + n_json - size} bytes; copy it again")
    try:
        values = json.loads(file.read(n_json)) if n_json <= _MAX_JSON_BYTES else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
