"""The LLM worker: the child's side (serve) and the parent's (LlmClient, an Engine like the one inside).

The client keeps the promise that a dead worker costs time, not the answer: it starts another, sends the same request
with the tokens that were already shown, and goes on; once per request.

With RKLLM two things come on top.  Some libraries crash on runs above a length (airockchip/rknn-llm #123), others
crash now and then, and one crash does not tell which.  So a run that crashes before its first token is simply sent
again, as after any crash.  Its length is to blame where all of this holds: no run so long ever worked; a second worker
crashed on it as well; and a third one did not crash on a run of a single row.  Then none is as long from now on
(safe_rows in the profile; `mmchat calibrate` finds the true limit), and the request is sent a last time: the engine
feeds it in parts where it can, and else refuses it.

And where the library sets sampling only while loading (up to 1.2.3), other values make the client load it again, in a
new process: destroying and loading in one process is reported to lose memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmchat.child import Handler
from mmchat.engine import (
    SILENCE_S,
    SLOWEST_ROWS_PER_S,
    Done,
    Engine,
    Event,
    ImageRows,
    Piece,
    Prefill,
    Restarted,
    Sampling,
    Token,
    Tokens,
)
from mmchat.errors import EngineError, PromptError, SamplingFixed, WorkerDied, WorkerError
from mmchat.model_dir import ModelSpec, open_model
from mmchat.profile import Profile
from mmchat.store import Store
from mmchat.worker import Exclusive, Worker

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
        self.silence_s: float | None = None  # the longest that the engine may say nothing; None: see SILENCE_S
        self._rkllm = rkllm
        # One answer may take several requests, each of which another thread's would spoil.
        self._turns = rkllm and (
            rkllm.npu or Exclusive("the LLM worker is still streaming another answer in this thread")
        )
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

    @property
    def prompt_rows(self) -> int:
        """Rows that a prompt may have where nothing of it is cached: less than the context where long runs crash."""
        profile = self._rkllm.profile if self._rkllm else None
        if profile is None or profile.safe_rows is None or profile.chunks:
            return self.context_rows
        return min(profile.safe_rows, self.context_rows)

    def forget(self, strategy: str | None = None) -> str:
        """The next answer is computed whole, whatever is cached; for whoever compares the two.

        strategy: what RKLLM's engine does with its cache from now on, until its worker ends; None: as the profile has
        it.  Returns what the engine did until now, which is "resend" where it gave up another one.

        Raises what loading the model raises, WorkerError.
        """
        findings = self._rkllm.profile.findings(strategy) if self._rkllm else None
        (told,) = self.worker.call({"forget": findings}, silence_s=self.silence_s or SILENCE_S)
        return str(told["strategy"])

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """See Engine.generate.  Raises WorkerDied or WorkerTimeout where the second worker fails as well.

        Raises ContextFull where RKLLM crashes on runs of that length; see above.
        """
        with self._turns.held(should_stop) if self._turns else contextlib.nullcontext(True) as is_mine:
            if not is_mine:
                yield _cancelled(pieces, resume_ids)
                return
            yield from self._generate(pieces, sampling, should_stop, list(resume_ids))

    def _generate(
        self, pieces: Sequence[Piece], sampling: Sampling, should_stop: Callable[[], bool], shown: list[int]
    ) -> Iterator[Event]:
        crashes: list[int] = []  # one per worker that died: the rows of a run that no run was ever as long as, or 0
        reloaded = learned = done = False
        while True:
            request = {"pieces": _pieces_to_wire(pieces), "sampling": sampling.to_dict(), "resume_ids": shown}
            n_rows_run = 0  # of the run under way, until its first token
            n_whole = sum(piece.n_rows for piece in pieces) if self._rkllm else 0
            silence_s = self.silence_s or max(SILENCE_S, n_whole / SLOWEST_ROWS_PER_S)
            try:
                for message in self.worker.call(request, silence_s=silence_s, should_stop=should_stop):
                    event = _event_from_wire(message)
                    if n_rows_run and not (isinstance(event, Prefill) and event.done == 0):
                        if not (isinstance(event, Done) and event.reason == "cancelled"):  # it may not have run at all
                            self._worked(n_rows_run)
                        n_rows_run = 0
                    if isinstance(event, Prefill) and event.done < event.total:
                        n_rows_run = self._longest(event.total - event.done)
                    elif isinstance(event, Token):
                        shown.append(event.id)
                    yield event
                    done = done or isinstance(event, Done)
                if done:
                    return
                # Cancelled while the model was loading: the request was never sent.
                yield _cancelled(pieces, shown)
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
                crashes.append(self._suspected(error, n_rows_run))
                if learned or (len(crashes) > 1 and not crashes[-1]) or len(crashes) > 3:
                    raise
                if len(crashes) > 1 and crashes[-1] == crashes[-2]:
                    if not self._learn(crashes[-1], sampling):
                        raise
                    learned = True
                why = str(error)
            yield Restarted(why)

    def _longest(self, n_rows: int) -> int:
        """Of the runs that the engine makes of n_rows, the longest."""
        safe_rows = self._rkllm.profile.safe_rows if self._rkllm else None
        return n_rows if safe_rows is None else min(n_rows, safe_rows)

    def _worked(self, n_rows: int) -> None:
        if self._rkllm and n_rows > self._rkllm.profile.worked_rows:
            self._rkllm.profile.update(worked_rows=n_rows)

    def _suspected(self, error: WorkerError, n_rows: int) -> int:
        """n_rows, where the length of the run may have made it crash; else 0."""
        if not self._rkllm or not isinstance(error, WorkerDied) or error.exit_code not in _CRASHES:
            return 0
        return n_rows if n_rows > max(self._rkllm.profile.worked_rows, _ALWAYS_SAFE_ROWS) else 0

    def _learn(self, n_rows: int, sampling: Sampling) -> bool:
        """After a second crash: whether a short run works, so that it was the length.  Then that is recorded."""
        assert self._rkllm is not None
        profile = self._rkllm.profile
        # Where prompts are fed in parts it costs little to keep to what has worked; else every row counts.
        safe_rows = max(profile.worked_rows, _ALWAYS_SAFE_ROWS) if profile.chunks else n_rows - 1
        self._reload(findings={**profile.findings(), "safe_rows": safe_rows})
        shortest = {"pieces": [[0]], "sampling": replace(sampling, max_new_tokens=1).to_dict(), "resume_ids": []}
        try:
            for _ in self.worker.call(shortest, silence_s=SILENCE_S):
                pass
        except EngineError:
            self._reload(findings=profile.findings())
            return False
        profile.update(safe_rows=safe_rows, crashed_rows=[*profile.crashed_rows, n_rows])
        _LOG.warning(
            "the RKLLM library crashed twice on a run of %d rows, more than ever worked (%d), but not on a short one: "
            "none is longer than %d from now on (%s); mmchat calibrate finds the true limit",
            n_rows, profile.worked_rows, safe_rows, profile.path,
        )  # fmt: skip
        return True

    def _reload(self, **values: Any) -> None:
        self._config = {**self._config, "rkllm": {**self._config["rkllm"], **values}}
        self.worker.reload(self._config)


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the model, answer requests."""
    engine, forget = _rkllm(config) if config["rkllm"] else _openvino(config)

    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        if "forget" in request:
            yield {"strategy": forget(request["forget"])}
            return
        pieces = _pieces_from_wire(request["pieces"])
        sampling = Sampling.from_dict(request["sampling"])
        for event in engine.generate(pieces, sampling, should_stop, resume_ids=request["resume_ids"]):
            yield {"kind": type(event).__name__.lower(), **vars(event)}

    return {"context_rows": engine.context_rows}, handle


_Forget = Callable[[Any], str]  # takes findings (RKLLM), gives what the engine did with its cache


def _openvino(config: dict[str, Any]) -> tuple[Engine, _Forget]:
    from mmchat.openvino_engine import open_engine
    from mmchat.prompt import ChatTokenizer

    spec = open_model(Path(config["folder"]))
    engine = open_engine(
        spec,
        ChatTokenizer(spec.tokenizer_path),
        Store(**config["store"]).get,
        context_rows=config["context_rows"],
        n_threads=config["n_threads"],
    )

    def forget(findings: Any) -> str:
        engine.forget()
        return "rewind"

    return engine, forget


def _rkllm(config: dict[str, Any]) -> tuple[Engine, _Forget]:
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
    engine = RkllmEngine(
        model,
        table,
        tokenizer,
        Store(**config["store"]).get,
        context_rows=config["context_rows"],
        findings=Findings(**options["findings"]),
    )

    def forget(findings: Any) -> str:
        strategy = engine.strategy
        engine.forget(Findings(**findings))
        return strategy

    return engine, forget


def _cancelled(pieces: Sequence[Piece], ids: Sequence[int]) -> Done:
    """Before the engine was asked."""
    return Done("cancelled", "", tuple(ids), sum(piece.n_rows for piece in pieces), 0, 0, len(ids), 0.0, 0.0)


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
