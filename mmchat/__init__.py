"""mmchat: chat about many images over many turns with MiniCPM-V-2.6.

    import mmchat

    with mmchat.open("demo") as rt:
        chat = rt.session()
        for text in chat.ask("What colour is the circle?", images=["circle.png"]):
            print(text, end="", flush=True)

Importing this imports nothing heavy: names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmchat.context import Policy
    from mmchat.engine import Sampling
    from mmchat.errors import (
        BundleError,
        ContextFull,
        DiskFull,
        DownloadError,
        EngineBusy,
        EngineError,
        ImageError,
        MmchatError,
        ModelDirError,
        OptionError,
        PromptError,
        RegressError,
        SessionError,
        StoreError,
        ToolkitError,
        VideoError,
        WorkerDied,
        WorkerError,
        WorkerTimeout,
    )
    from mmchat.forecast import Plan
    from mmchat.record import ImageHandle, Turn, Usage
    from mmchat.runtime import Runtime, open
    from mmchat.session import Reply, Session

__version__ = "0.1.0"

_MODULES = ("doctor", "images", "video")  # used by their own names
_HOME = {
    "context": ("Policy",),
    "engine": ("Sampling",),
    "errors": (
        "BundleError",
        "ContextFull",
        "DiskFull",
        "DownloadError",
        "EngineBusy",
        "EngineError",
        "ImageError",
        "MmchatError",
        "ModelDirError",
        "OptionError",
        "PromptError",
        "RegressError",
        "SessionError",
        "StoreError",
        "ToolkitError",
        "VideoError",
        "WorkerDied",
        "WorkerError",
        "WorkerTimeout",
    ),
    "forecast": ("Plan",),
    "record": ("ImageHandle", "Turn", "Usage"),
    "runtime": ("Runtime", "open"),
    "session": ("Reply", "Session"),
}

__all__ = [
    "BundleError",
    "ContextFull",
    "DiskFull",
    "DownloadError",
    "EngineBusy",
    "EngineError",
    "ImageError",
    "ImageHandle",
    "MmchatError",
    "ModelDirError",
    "OptionError",
    "Plan",
    "Policy",
    "PromptError",
    "RegressError",
    "Reply",
    "Runtime",
    "Sampling",
    "Session",
    "SessionError",
    "StoreError",
    "ToolkitError",
    "Turn",
    "Usage",
    "VideoError",
    "WorkerDied",
    "WorkerError",
    "WorkerTimeout",
    "__version__",
    "open",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mmchat.{name}")
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"mmchat.{module}"), name)
    raise AttributeError(f"module 'mmchat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
