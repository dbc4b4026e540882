"""The composition root: a model folder -> store, workers, sessions.  The only place that names implementations."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from mmchat.board_files import file_mark
from mmchat.bundle import Bundle
from mmchat.context import Policy
from mmchat.engine import Engine
from mmchat.errors import ModelDirError
from mmchat.forecast import Outlook, of_board
from mmchat.llm_proc import LlmClient, Rkllm
from mmchat.model_dir import DEMO, OPENVINO_CURE, ModelSpec, cpu_caches, open_model
from mmchat.profile import Profile, state_folder
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_detect import LIBRARY, LIBRARY_FOLDERS
from mmchat.saving import Restored
from mmchat.session import Session
from mmchat.store import Store, default_cap, open_store
from mmchat.vision_proc import VisionClient
from mmchat.worker import Exclusive

ENGINES = ("auto", "openvino", "rkllm")
_WEIGHTS = (".safetensors", ".bin", ".rkllm", ".rknn")


class Runtime:
    """A loaded model: one vision worker, one LLM worker, one store; any number of sessions."""

    def __init__(
        self, spec: ModelSpec, store: Store, *, context_rows: int, n_threads: int | None, rkllm: Rkllm | None = None
    ) -> None:
        self.spec = spec
        self.store = store
        self.tokenizer = ChatTokenizer(spec.tokenizer_path)
        self.llm = LlmClient(spec, store, context_rows=context_rows, n_threads=n_threads, rkllm=rkllm)
        self.engine: Engine = self.llm  # what new sessions are given; whoever watches it puts another one around it
        self.vision = open_vision(spec, store, n_threads=n_threads, npu=rkllm.npu if rkllm else None)
        self.parallel = not (rkllm and rkllm.npu)  # whether encoder and LLM may work at the same time
        self.rkllm = rkllm  # None with another engine
        self._outlook = _outlook(spec, rkllm.profile if rkllm else None, context_rows, n_threads)

    @property
    def strategy(self) -> str:
        """What the engine does with its KV cache: "rewind" (OpenVINO), or RKLLM's, as its profile has it."""
        return self.rkllm.profile.strategy if self.rkllm else "rewind"

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
        policy: Policy | str | Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
        autosave: str | Path | None = None,
    ) -> Session:
        """A new conversation.

        Any number of them share the engine.  Answers that several threads ask for at once come one after the other, in
        the order in which they were begun; a thread that begins one while it streams another gets EngineBusy.  Going
        from one conversation to another costs the rows that the two do not begin with in common, unless the engine has
        a cache for each: OpenVINO keeps four, or as many as fit into 1 GiB; RKLLM has one.

        system: the system prompt; None or "" is the model's.  max_slice_nums: cells per picture at most; None is the
        model's (9).  use_image_id: number the pictures in the prompt; None is the model's choice.
        reference_pixels: read pictures exactly as the published processor does (mmchat.images says what differs).
        policy: what to do where the conversation does not fit any more: "error", or steps in the order in which they
            are taken, by default ("overview", "line", "turns"); mmchat.Policy has more to set.  mmchat.context says
            what they do.
        sampling: fields of mmchat.engine.Sampling over the model's own values, for every turn.
        autosave: a new file that is kept up to date after every turn (Session.autosave has more to choose).

        Raises ImageError for an impossible max_slice_nums, SessionError for an impossible policy, PromptError
        (sampling), BundleError (autosave).
        """
        session = self._session(
            system=system,
            max_slice_nums=max_slice_nums,
            use_image_id=use_image_id,
            reference_pixels=reference_pixels,
            policy=policy,
            sampling=sampling,
        )
        if autosave is not None:
            session.autosave(autosave)
        return session

    def load(self, path: str | Path, *, autosave: bool = False) -> Session:
        """A conversation from a file that Session.save or autosave wrote, with the settings it had.

        What could not be read is left out, and what does not fit this model is made again; Session.notes says what.
        autosave: go on in that file.  It is kept under another name then, too, where it is damaged, or names embeddings
            of pictures that only its own model can use and that are not in it as files.

        Raises BundleError: no such file, not a bundle, of a newer version; with autosave: being saved to already.
        """
        bundle = Bundle(path, write=autosave)
        restored = Restored(bundle, self.spec, self.tokenizer, self.store)
        n_turns = len(restored.turns)
        n_foreign = n_turns if bundle.damaged else self._outlook.n_foreign(bundle.record.state, n_turns)
        session = self._session(**restored.options, n_foreign=n_foreign)
        if autosave:
            session.resume(bundle, has_less=restored.has_less)
        return session

    def _session(self, **options: Any) -> Session:
        return Session(
            self.spec, self.tokenizer, self.store, self.vision, self.engine, outlook=self._outlook, **options
        )

    def ready(self) -> None:
        """Wait until the LLM is loaded.  Raises ModelDirError, WorkerDied, WorkerTimeout."""
        self.llm.worker.ready()

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
    store_cap_bytes: int | None = None,
    context_rows: int | None = None,
    n_threads: int | None = None,
) -> Runtime:
    """Open a model; its LLM begins to load at once, its encoder when a picture needs it.

    model: "demo", or a model folder.  engine: "openvino" for a checkpoint or an OpenVINO folder, "rkllm" for a board's
        folder; "auto" is what the folder is for.  RKLLM's library is $MMCHAT_RKLLM_LIB, else librkllmrt.so in the
        folder, else the one in /usr/lib, /usr/lib/aarch64-linux-gnu or /usr/local/lib; $MMCHAT_RKLLM_FAMILY names its
        ABI where it cannot be found out.
    store: folder for image embeddings; None is $MMCHAT_STORE, else ~/.cache/mmchat/embeddings (under
        $XDG_CACHE_HOME where that is set), or a folder for this user in the system's temporary folder where
        neither can be written.  Where that is full or read-only, embeddings are kept in memory (mmchat.store says
        how), and a warning says so.
    store_cap_bytes: that the store may take, least recently used first out; None is $MMCHAT_STORE_CAP, else 2 GiB.
    context_rows: a smaller context than the model has.  n_threads: CPU threads; None is OpenVINO's choice.

    Raises ModelDirError, StoreError (there can be no such folder as the store that was named).
    """
    if engine not in ENGINES:
        raise ModelDirError(f"engine is {engine!r}; known are {', '.join(ENGINES)}")
    spec = open_model(model)
    if engine == "rkllm" and not spec.board:
        raise ModelDirError(f'{spec.folder}: has no model for RKLLM (*.rkllm); use engine="openvino"')
    if engine == "openvino" and spec.board:
        raise ModelDirError(f'{spec.folder}: has no weights for OpenVINO\'s LLM; use engine="rkllm"')
    if spec.board is None and importlib.util.find_spec("openvino") is None:
        raise ModelDirError(f"{spec.folder}: runs on the CPU engine, {OPENVINO_CURE}")
    limit = spec.context_of(context_rows)
    rkllm = _rkllm(spec) if spec.board else None
    cap_bytes = default_cap(os.environ) if store_cap_bytes is None else store_cap_bytes
    kept = open_store(store, cap_bytes, os.environ)
    runtime = Runtime(spec, kept, context_rows=limit, n_threads=n_threads, rkllm=rkllm)
    runtime.llm.worker.start()
    return runtime


def outlook(spec: ModelSpec, context_rows: int) -> Outlook:
    """What sessions on a model begin with, without opening it.  Raises ModelDirError: there is no library (board)."""
    return _outlook(spec, Profile.open(spec, find_library(spec)) if spec.board else None, context_rows, None)


def find_library(spec: ModelSpec) -> Path:
    """RKLLM's library.  Raises ModelDirError where there is none."""
    named = os.environ.get("MMCHAT_RKLLM_LIB")
    folders = [spec.folder, *map(Path, LIBRARY_FOLDERS)]
    places = [Path(os.path.abspath(os.path.expanduser(named)))] if named else [folder / LIBRARY for folder in folders]
    for place in places:
        if place.is_file():
            return place
    raise ModelDirError(
        f"no RKLLM library: {', '.join(map(str, places))} {'is' if named else 'are'} not there; copy the board's "
        f"{LIBRARY} into the model's folder, or name it in MMCHAT_RKLLM_LIB"
    )


def open_vision(
    spec: ModelSpec, store: Store, *, n_threads: int | None = None, npu: Exclusive | None = None
) -> VisionClient:
    """The encoder, which loads when it is needed; close its worker."""
    log_file = state_folder() / "rknn.log" if spec.board and spec.board.rknn else None
    return VisionClient(spec, store, n_threads=n_threads, npu=npu, log_file=log_file)


def _rkllm(spec: ModelSpec) -> Rkllm:
    assert spec.board is not None
    library = find_library(spec)
    shared = spec.board.rknn is not None  # both on the NPU, which hangs when they work at the same time
    return Rkllm(
        library,
        Profile.open(spec, library),
        family=os.environ.get("MMCHAT_RKLLM_FAMILY") or None,
        npu=Exclusive("the NPU is still busy with another answer in this thread") if shared else None,
        log_file=state_folder() / "rkllm.log",
    )


def _outlook(spec: ModelSpec, profile: Profile | None, context_rows: int, n_threads: int | None) -> Outlook:
    """profile: of a board's library."""
    made_by = _made_by(spec, profile.key if profile else "", n_threads)
    if profile is None:
        return Outlook(n_caches=cpu_caches(spec.llm, context_rows), made_by=made_by)
    return Outlook(
        lambda: profile.strategy,
        rewinds=lambda: profile.rewinds,
        longest=lambda: None if profile.chunks else profile.safe_rows,
        speeds=lambda: of_board(profile.encode_s_per_slice, profile.prefill_rows_per_s, profile.decode_tokens_per_s),
        published=True,
        made_by=made_by,
    )


def _made_by(spec: ModelSpec, library: str, n_threads: int | None) -> Callable[[], str]:
    """A digest of what speeds depend on, when it is first asked for; "" where the files cannot be read."""

    @cache
    def digest() -> str:
        try:
            weights = sorted(path for path in spec.folder.iterdir() if path.suffix in _WEIGHTS)
            marks = [f"{path.name} {file_mark(path)}" for path in weights]
        except OSError:
            return ""
        parts = [platform.node(), platform.machine(), os.cpu_count(), n_threads, library, *marks]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]

    return digest
