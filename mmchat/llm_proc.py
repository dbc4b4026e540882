"""The LLM worker: the child's side (serve) and the parent's (LlmClient, an Engine like the one inside).

The client keeps the promise that a dead worker costs time, not the answer: it starts another, sends the same request
with the tokens that were already shown, and goes on; once per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmchat.child import Handler
from mmchat.engine import Done, Event, ImageRows, Piece, Prefill, Restarted, Sampling, Token, Tokens
from mmchat.errors import PromptError, WorkerError
from mmchat.model_dir import ModelSpec
from mmchat.store import Store
from mmchat.worker import Worker

# A prefill chunk of the 8B model on a slow board takes tens of seconds; a token, under one.
SILENCE_S = 300.0

_EVENTS: dict[str, type[Prefill] | type[Token] | type[Done]] = {"prefill": Prefill, "token": Token, "done": Done}


class LlmClient:
    """The engine in its worker, for the parent.  Safe to use from several threads: they take turns."""

    def __init__(self, spec: ModelSpec, store: Store, *, context_rows: int, n_threads: int | None = None) -> None:
        self.context_rows = context_rows
        config = {
            "folder": str(spec.folder),
            "store": str(store.root),
            "store_cap_bytes": store.cap_bytes,
            "context_rows": context_rows,
            "n_threads": n_threads,
        }
        self.worker = Worker(__name__, config, name="LLM")

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """See Engine.generate.  Raises WorkerDied or WorkerTimeout where the second worker fails as well."""
        shown = list(resume_ids)
        for attempt in (1, 2):
            request = {"pieces": _pieces_to_wire(pieces), "sampling": sampling.to_dict(), "resume_ids": shown}
            try:
                for message in self.worker.call(request, silence_s=SILENCE_S, should_stop=should_stop):
                    event = _event_from_wire(message)
                    if isinstance(event, Token):
                        shown.append(event.id)
                    yield event
                return
            except WorkerError as error:
                if attempt == 2:
                    raise
                why = str(error)
            yield Restarted(why)


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the model, answer requests."""
    from mmchat.checkpoint import Checkpoint
    from mmchat.embed_table import EmbedTable
    from mmchat.model_dir import open_model
    from mmchat.openvino_engine import OpenVinoEngine
    from mmchat.prompt import ChatTokenizer

    spec = open_model(Path(config["folder"]))
    engine = OpenVinoEngine(
        Checkpoint(spec.folder),
        spec.llm,
        EmbedTable.open(spec.embed_table_path),
        ChatTokenizer(spec.tokenizer_path),
        Store(config["store"], config["store_cap_bytes"]).get,
        context_rows=config["context_rows"],
        n_threads=config["n_threads"],
    )

    def handle(request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        pieces = _pieces_from_wire(request["pieces"])
        sampling = Sampling.from_dict(request["sampling"])
        for event in engine.generate(pieces, sampling, should_stop, resume_ids=request["resume_ids"]):
            yield {"kind": type(event).__name__.lower(), **asdict(event)}

    return {"context_rows": engine.context_rows}, handle


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
