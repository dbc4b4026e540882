"""Stand-ins for Rockchip's converters, and a Python that has them.

**They are not Rockchip's packages.**  `rknn` has the calls of rknn-toolkit2 2.5.0 that mmchat makes, "compiles" by
keeping the ONNX, and simulates with onnxruntime.  `rkllm` has the signatures of rkllm-toolkit as its examples and its
docstrings give them (1.1.0 to 1.3.0).  Both fail on request, as the real ones were seen or reported to.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def write_python(path: Path, **behaviour: Any) -> Path:
    """A program that is this Python with the stand-ins in its reach; behaviour: what they do wrong, by name."""
    lines = (
        "#!/bin/sh",
        f"export PYTHONPATH={shlex.quote(str(HERE))}",
        f"export MMCHAT_FAKE={shlex.quote(json.dumps(behaviour))}",
        f'exec {shlex.quote(sys.executable)} "$@"',
    )
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path
