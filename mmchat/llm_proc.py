"""The LLM worker: the child's side (serve) and the parent's (LlmClient, an Engine like the one inside).

The client keeps the promise that a dead worker costs time, not the answer: it starts another, sends the same request
with the tokens that were already shown, and goes on; once per request.

With RKLLM two things come on top.  A library that crashes on a run that is longer than any that ever worked (as some
do, airockchip/rknn-llm #123) would crash again: the length is recorded in the profile and refused from then on.  And
where the library sets sampling only while loading (up to 1.2.3), other values make the client load it again, in a new
process: destroying and loading in one process is reported to lose memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmchat.child import Handler
from mmchat.engine import Done, Engine, Event, ImageRows, Piece, Prefill, Restarted, Sampling, Token, Tokens
from mmchat.errors import ContextFull, PromptError, SamplingFixed, WorkerDied, WorkerError
from mmchat.model_dir import ModelSpec, open_model
from mmchat.profile import Profile
from mmchat.store import Store
from mmchat.worker import Exclusive, Worker

# A prefill chunk of the 8B model on a slow board takes tens of seconds; a token, under one.
SILENCE_S = 300.0
# A run of fewer rows does not crash for its length; the ladder of calibration begins here.
_ALWAYS_SAFE_ROWS = 64
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}  # not SIGKILL: that is somebody else, or no memory

_LOG = logging.getLogger("mmchat")

_EVENTS: dict[str, type[Prefill] | type[Token] | type[Done]] = {"prefill": Prefill, "token": Token, "done": Done}


@dataclass(frozen=True)
class Rkllm:
    """What the RKLLM engine needs beyond the model's folder.

    family: the user's word for the library's ABI; None finds it.  npu: held while the LLM works, where the encoder
    shares the NPU.  log_file: for what the library writes.
    """

    library: Path
    profile: Profile
    family: str | None = None
    npu: Exclusive | None = None
    log_file: Path | None = None


class LlmClient:
    """The engine in its worker, for the parent.  Safe to use from several threads: they take turns."""

    def __init__(
        self,
        spec: ModelSpec,
        store: Store,
        *,
        context_rows: int,
        n_threads: int | None = None,
        rkllm: Rkllm | None = None,
    ) -> None:
        """rkllm: run the model on RKLLM; None is OpenVINO."""
        self.context_rows = context_rows
        self._rkllm = rkllm
        self._config: dict[str, Any] = {
            "folder": str(spec.folder),
            "store": store.to_dict(),
            "context_rows": context_rows,
            "n_threads": n_threads,
            "rkllm": None,
        }
        if rkllm:
            self._config["rkllm"] = {
                "library": str(rkllm.library),
                "family": rkllm.family,
                "sampling": spec.sampling.to_dict(),
                "findings": rkllm.profile.findings(),
            }
        self.worker = Worker(__name__, self._config, name="LLM", log_file=rkllm.log_file if rkllm else None)

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """See Engine.generate.  Raises WorkerDied or WorkerTimeout where the second worker fails as well.

        Raises ContextFull where RKLLM crashed on a run that is longer than any that worked, and from then on.
        """
        npu = self._rkllm.npu if self._rkllm else None
        with npu.held() if npu else contextlib.nullcontext():
            yield from self._generate(pieces, sampling, should_stop, list(resume_ids))

    def _generate(
        self, pieces: Sequence[Piece], sampling: Sampling, should_stop: Callable[[], bool], shown: list[int]
    ) -> Iterator[Event]:
        attempt, reloaded, done = 1, False, False
        while True:
            request = {"pieces": _pieces_to_wire(pieces), "sampling": sampling.to_dict(), "resume_ids": shown}
            n_rows_run = 0  # of the run under way, until its first token
            try:
                for message in self.worker.call(request, silence_s=SILENCE_S, should_stop=should_stop):
                    event = _event_from_wire(message)
                    if isinstance(event, Prefill) and event.done == 0:
                        n_rows_run = event.total
                    elif isinstance(event, Token):
                        shown.append(event.id)
                    if n_rows_run and not (isinstance(event, Prefill) and event.done == 0):
                        self._worked(n_rows_run)
                        n_rows_run = 0
                    yield event
                    done = done or isinstance(event, Done)
                if done:
                    return
                # Cancelled while the model was loading: the request was never sent.
                n_rows = sum(piece.n_rows for piece in pieces)
                yield Done("cancelled", "", tuple(shown), n_rows, 0, 0, len(shown), 0.0, 0.0)
                return
            except SamplingFixed as error:
                if reloaded or not self._rkllm:
                    raise
                reloaded = True
                _LOG.warning("%s; that is done now", error)
                self._reload(sampling=sampling.to_dict())
                continue
            except WorkerError as error:
                if done:  # and told so: the next request starts another worker
                    return
                self._learn(error, n_rows_run)
                if attempt == 2:
                    raise
                attempt, why = 2, str(error)
            yield Restarted(why)

    def _worked(self, n_rows: int) -> None:
        if self._rkllm and n_rows > self._rkllm.profile.worked_rows:
            self._rkllm.profile.update(worked_rows=n_rows)

    def _learn(self, error: WorkerError, n_rows: int) -> None:
        """Record a crash that the length of the run explains.  Raises ContextFull for it."""
        if not self._rkllm or not isinstance(error, WorkerDied) or error.exit_code not in _CRASHES:
            return
        profile = self._rkllm.profile
        if n_rows <= max(profile.worked_rows, _ALWAYS_SAFE_ROWS):
            return
        profile.update(safe_rows=n_rows - 1, crashed_rows=[*profile.crashed_rows, n_rows])
        _LOG.warning(
            "the RKLLM library crashed on a run of %d rows, more than ever worked (%d): such runs are refused from now "
            "on (%s); mmchat calibrate finds the true limit",
            n_rows, profile.worked_rows, profile.path,
        )  # fmt: skip
        self._reload(findings=profile.findings())
        self.worker.start()
        raise ContextFull(n_rows, 0, n_rows - 1) from None

    def _reload(self, **values: Any) -> None:
        self._config = {**self._config, "rkllm": {**self._config["rkllm"], **values}}
        self.worker.reload(self._config)


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the model, answer requests."""
    engine = _rkllm(config) if config["rkllm"] else _openvino(config)

    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        pieces = _pieces_from_wire(request["pieces"])
        sampling = Sampling.from_dict(request["sampling"])
        for event in engine.generate(pieces, sampling, should_stop, resume_ids=request["resume_ids"]):
            yield {"kind": type(event).__name__.lower(), **vars(event)}

    return {"context_rows": engine.context_rows}, handle


def _openvino(config: dict[str, Any]) -> Engine:
    from mmchat.checkpoint import Checkpoint
    from mmchat.embed_table import EmbedTable
    from mmchat.openvino_engine import OpenVinoEngine
    from mmchat.prompt import ChatTokenizer

    spec = open_model(Path(config["folder"]))
    return OpenVinoEngine(
        Checkpoint(spec.folder),
        spec.llm,
        EmbedTable.open(spec.embed_table_path),
        ChatTokenizer(spec.tokenizer_path),
        Store(**config["store"]).get,
        context_rows=config["context_rows"],
        n_threads=config["n_threads"],
    )


def _rkllm(config: dict[str, Any]) -> Engine:
    from mmchat.rkllm_embed import Findings, RkllmEngine, load_board

    spec, options = open_model(Path(config["folder"])), config["rkllm"]
    os.environ.setdefault("RKLLM_LOG_LEVEL", "1")  # the library reads it when it is loaded
    model, table, tokenizer, _ = load_board(
        spec,
        Path(options["library"]),
        family=options["family"],
        context_rows=config["context_rows"],
        sampling=Sampling.from_dict(options["sampling"]),
    )
    return RkllmEngine(
        model,
        table,
        tokenizer,
        Store(**config["store"]).get,
        context_rows=config["context_rows"],
        findings=Findings(**options["findings"]),
    )


def _pieces_to_wire(pieces: Sequence[Piece]) -> list[Any]:
    return [list(piece.ids) if isinstance(piece, Tokens) else [piece.key, piece.n_rows] for piece in pieces]


def _pieces_from_wire(wire: list[Any]) -> list[Piece]:
    pieces: list[Piece] = []
    for item in wire:
        if len(item) == 2 and isinstance(item[0], str):
            pieces.append(ImageRows(item[0], int(item[1])))
        elif all(type(number) is int for number in item):
            pieces.append(Tokens(tuple(item)))
        else:
            raise PromptError("a piece that is neither token ids nor an image")
    return pieces


def _event_from_wire(message: dict[str, Any]) -> Event:
    values = {name: value for name, value in message.items() if name != "kind"}
    if "ids" in values:
        values["ids"] = tuple(values["ids"])
    return _EVENTS[message["kind"]](**values)
