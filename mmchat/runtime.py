"""The composition root: a model folder -> store, workers, sessions.  The only place that names implementations."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

from mmchat.errors import ModelDirError, StoreError
from mmchat.llm_proc import LlmClient
from mmchat.model_dir import DEMO, ModelSpec, open_model
from mmchat.prompt import ChatTokenizer
from mmchat.session import Session
from mmchat.store import DEFAULT_CAP_BYTES, Store
from mmchat.vision_proc import VisionClient

ENGINES = ("auto", "openvino", "rkllm")


class Runtime:
    """A loaded model: one vision worker, one LLM worker, one store; any number of sessions."""

    def __init__(self, spec: ModelSpec, store: Store, *, context_rows: int, n_threads: int | None) -> None:
        self.spec = spec
        self.store = store
        self.tokenizer = ChatTokenizer(spec.tokenizer_path)
        self.llm = LlmClient(spec, store, context_rows=context_rows, n_threads=n_threads)
        self.vision = VisionClient(spec, store, n_threads=n_threads)

    @property
    def context_rows(self) -> int:
        """Rows that a prompt and its answer may take together."""
        return self.llm.context_rows

    def session(
        self,
        system: str | None = None,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
        reference_pixels: bool = False,
    ) -> Session:
        """A new conversation.

        system: the system prompt; None or "" is the model's.  max_slice_nums: cells per picture at most; None is the
        model's (9).  use_image_id: number the pictures in the prompt; None is the model's choice.
        reference_pixels: read pictures exactly as the published processor does (mmchat.images says what differs).

        Raises ImageError for an impossible max_slice_nums.
        """
        return Session(
            self.spec,
            self.tokenizer,
            self.store,
            self.vision,
            self.llm,
            system=system,
            max_slice_nums=max_slice_nums,
            use_image_id=use_image_id,
            reference_pixels=reference_pixels,
        )

    def close(self) -> None:
        """End both workers.  Idempotent."""
        self.llm.worker.close()
        self.vision.worker.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(
    model: str | Path = DEMO,
    *,
    engine: str = "auto",
    store: str | Path | None = None,
    store_cap_bytes: int = DEFAULT_CAP_BYTES,
    context_rows: int | None = None,
    n_threads: int | None = None,
) -> Runtime:
    """Open a model; its LLM begins to load at once, its encoder when a picture needs it.

    model: "demo", or a model folder.  engine: "auto" or "openvino" ("rkllm" is not built yet).
    store: folder for image embeddings; None is $MMCHAT_STORE, else ~/.cache/mmchat/embeddings (under
        $XDG_CACHE_HOME where that is set), or a folder for this user in the system's temporary folder where
        neither can be written.
    context_rows: a smaller context than the model has.  n_threads: CPU threads; None is OpenVINO's choice.

    Raises ModelDirError, StoreError (a store that was named cannot be used).
    """
    if engine not in ENGINES:
        raise ModelDirError(f"engine is {engine!r}; known are {', '.join(ENGINES)}")
    if engine == "rkllm":
        raise ModelDirError('this version has no RKLLM engine yet; use engine="openvino"')
    if context_rows is not None and context_rows < 1:
        raise ModelDirError(f"context_rows is {context_rows}; it must be at least 1")
    spec = open_model(model)
    limit = min(context_rows or spec.llm.context_rows, spec.llm.context_rows)
    runtime = Runtime(spec, _open_store(store, store_cap_bytes), context_rows=limit, n_threads=n_threads)
    runtime.llm.worker.start()
    return runtime


def _open_store(folder: str | Path | None, cap_bytes: int) -> Store:
    folder = folder or os.environ.get("MMCHAT_STORE")
    if folder:
        return Store(Path(folder).expanduser(), cap_bytes)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return Store(cache / "mmchat" / "embeddings", cap_bytes)
    except StoreError:
        return Store(Path(tempfile.gettempdir()) / f"mmchat-{os.getuid()}" / "embeddings", cap_bytes)
