"""Everything mmchat raises on purpose.

MmchatError                     catch this one
├── ImageError (ValueError)     a picture cannot be read or cut
├── VideoError (ValueError)     a source of frames cannot be opened, or not be captioned as asked
├── PromptError (ValueError)    a conversation has no valid prompt
├── ContextFull (ValueError)    the prompt and the answer do not fit the context
├── ModelDirError (ValueError)  a model folder or one of its files is missing, foreign or damaged
├── OptionError (ValueError)    an option has a value that cannot be
├── DownloadError               something could not be fetched, or is not what it should be
├── DiskFull                    a result does not fit on the disk
├── ToolkitError                a converter of Rockchip's is missing, failed, or made something that is wrong
├── StoreError                  the embedding store cannot be read or written
│   └── MissingEmbeddings       it no longer has what a request refers to
├── SessionError (ValueError)   a session call that its state does not allow
├── BundleError (ValueError)    a saved session cannot be read or written
├── RegressError (ValueError)   a conversation to be tried cannot be read or made
├── EngineBusy                  another answer is still being streamed by the same thread
└── EngineError                 the engine failed
    ├── SamplingFixed           it must be loaded again for these sampling values (clients do so)
    └── WorkerError             the process that runs it failed
        ├── WorkerDied          it is gone (crash, kill, out of memory)
        └── WorkerTimeout       it did not answer in time and was killed
"""

from __future__ import annotations

from collections.abc import Iterable


class MmchatError(Exception):
    """Base of every error below; its text is one line that a user can act on."""


class ImageError(MmchatError, ValueError):
    """A picture cannot be read or cut; the text names the picture and the reason."""


class VideoError(MmchatError, ValueError):
    """A source of frames cannot be opened, or not be captioned as asked; the text names the source or the value."""


class PromptError(MmchatError, ValueError):
    """A conversation that no valid prompt can be made of."""


class ContextFull(MmchatError, ValueError):
    """The prompt and the room kept for the answer exceed the context.

    n_prompt: rows of the prompt.  max_new_tokens: rows kept for the answer; 0 where it is the prompt alone that is too
    long, for a library that crashes on longer ones.  limit: rows allowed in all.  advice: what to do about it.
    """

    def __init__(
        self,
        n_prompt: int,
        max_new_tokens: int,
        limit: int,
        advice: str = "shorten the text, use fewer slices, or begin a new session",
    ) -> None:
        self.n_prompt, self.max_new_tokens, self.limit = n_prompt, max_new_tokens, limit
        what = f"and keeps {max_new_tokens} for the answer, but the context holds {limit}"
        if max_new_tokens == 0:
            what = f"but the library crashes on more than {limit} at once (or nobody knows: mmchat calibrate finds out)"
        super().__init__(f"the prompt has {n_prompt} rows {what}: {advice}")


class ModelDirError(MmchatError, ValueError):
    """A model folder, or a file in it, is missing, foreign or damaged."""


class OptionError(MmchatError, ValueError):
    """An option has a value that cannot be; the text names both, and what can."""


class DownloadError(MmchatError):
    """Something could not be fetched, or what came is not what the hub describes."""


class DiskFull(MmchatError):
    """A result does not fit on the disk.  needed, free: bytes."""

    def __init__(self, folder: object, needed: int, free: int) -> None:
        self.needed, self.free = needed, free
        super().__init__(f"{folder}: {needed / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free: make room")


class ToolkitError(MmchatError):
    """Rockchip's rknn-toolkit2 or rkllm-toolkit is missing, failed, or its result is not what it should be.

    call: the toolkit's function, or "".  log: all that it wrote.
    """

    def __init__(self, message: str, call: str = "", log: str = "") -> None:
        self.call, self.log = call, log
        super().__init__(message)


class StoreError(MmchatError):
    """The embedding store cannot be read or written."""


class MissingEmbeddings(StoreError):
    """The store no longer has these keys (evicted, or damaged and removed): encode the slices again."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        super().__init__(f"{len(self.keys)} image embedding(s) are no longer in the store")


class SessionError(MmchatError, ValueError):
    """A session call that the session's state does not allow."""


class BundleError(MmchatError, ValueError):
    """A saved session is missing, foreign or damaged, or cannot be written."""


class RegressError(MmchatError, ValueError):
    """A conversation to be tried (mmchat.regress) cannot be read or made; or what trying it needs is not installed."""


class EngineBusy(MmchatError):
    """This thread is still streaming another answer from the same engine."""


class EngineError(MmchatError):
    """The engine failed; the text carries its own message."""


class SamplingFixed(EngineError):
    """The library sets these sampling values only when the model is loaded; the LLM's client loads it again."""


class WorkerError(EngineError):
    """A worker process failed.  name: which one.  log: the tail of what it wrote to stderr."""

    def __init__(self, message: str, *, name: str, log: str = "") -> None:
        self.name, self.log = name, log
        super().__init__(message)


class WorkerDied(WorkerError):
    """A worker process is gone.  exit_code: as subprocess reports it (negative: killed by that signal)."""

    def __init__(self, message: str, *, name: str, log: str = "", exit_code: int | None = None) -> None:
        self.exit_code = exit_code
        super().__init__(message, name=name, log=log)


class WorkerTimeout(WorkerError):
    """A worker process was silent for longer than its request allowed and was killed."""
