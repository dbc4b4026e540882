"""The child's side of calibration: load the model and make the runs that mmchat.probes asks for.

It may crash: a crash is a result.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.child import Handler
from mmchat.embed_table import EmbedTable
from mmchat.engine import Done, ImageRows, Piece, Sampling, Tokens
from mmchat.errors import EngineError
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_embed import Findings, RkllmEngine, load_board
from mmchat.rkllm_model import Generated, Returned, RkllmModel
from mmchat.store import DEFAULT_CAP_BYTES, Store


def serve(config: dict[str, Any]) -> tuple[dict[str, Any], Handler]:
    """In the child: load the model, run what it is told."""
    os.environ.setdefault("RKLLM_LOG_LEVEL", "1")
    spec = open_model(config["folder"])
    started = time.perf_counter()
    model, table, tokenizer, found = load_board(
        spec,
        Path(config["library"]),
        family=config["family"],
        context_rows=spec.context_rows,
        sampling=Sampling(),  # greedy
    )
    facts = {
        "family": found.family,
        "version": found.version or found.family,
        "evidence": list(found.evidence),
        "ends_runs": model.family.run_sampling,
        "load_s": round(time.perf_counter() - started, 2),
    }
    store = Store(config["store"], DEFAULT_CAP_BYTES) if config["store"] else None
    return facts, _Child(model, table, tokenizer, store, spec.context_rows).handle


class _Child:
    def __init__(
        self, model: RkllmModel, table: EmbedTable, tokenizer: ChatTokenizer, store: Store | None, context_rows: int
    ) -> None:
        self._model, self._table, self._tokenizer = model, table, tokenizer
        self._store, self._context_rows = store, context_rows
        self._engine: RkllmEngine | None = None
        self._findings: Findings | None = None

    def handle(self, request: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Rows to run, or a turn of a conversation to answer ("findings": as the engine does with them)."""
        if "findings" in request:
            yield self._answer(request, should_stop)
        else:
            yield self._run(request, should_stop)

    def _run(self, request: dict[str, Any], should_stop: Callable[[], bool]) -> dict[str, Any]:
        """rows; keep: keep_history (False); clear: first (True); max_new (40); abort_after: so many tokens."""
        self._engine = None  # its cache is not what it knows any more
        embeds = self._embeds(request["rows"])
        max_new = request.get("max_new", 40)
        limit = request.get("abort_after", max_new)
        if request.get("clear", True):
            self._model.clear()
        ids: list[int] = []
        ended = missed = False  # missed: the library goes on behind the end token
        aborted_at = 0.0
        started = prefilled = time.perf_counter()

        def enough() -> bool:
            nonlocal aborted_at
            # A library that knows max_new_tokens of this run ends it by itself; its cache stays known.
            full = not ended and len(ids) >= limit and (limit < max_new or not self._model.family.run_sampling)
            over = full or missed
            if over and not aborted_at:
                aborted_at = time.perf_counter()
            return over or should_stop()

        returned: Returned | None = None
        for message in self._model.run(
            embeds,
            keep_history=request.get("keep", False),
            sampling=Sampling(max_new_tokens=max_new),
            should_stop=enough,
        ):
            if isinstance(message, Generated):
                prefilled = time.perf_counter() if prefilled == started else prefilled
                if ended:
                    missed = True
                elif message.token_id in self._tokenizer.stop_ids:
                    ended = True
                else:
                    ids.append(message.token_id)
            else:
                returned = message
        now = time.perf_counter()
        if returned is None:
            raise EngineError("rkllm_run told nothing")
        if not returned.aborted:
            returned.check()
        return {
            "ids": ids[:max_new],
            "ended": ended and returned.finished and not returned.aborted,
            "aborted": returned.aborted,
            "finished": returned.finished,
            "n_rows": len(embeds),
            "prefilled": returned.perf.prefilled if returned.perf else None,
            "kv_rows": self._model.kv_rows(),
            "prefill_s": (now if prefilled == started else prefilled) - started,
            "generate_s": now - prefilled,
            "abort_s": round(now - aborted_at, 3) if aborted_at else None,
            "rss_mb": _rss_mb(),
        }

    def _answer(self, request: dict[str, Any], should_stop: Callable[[], bool]) -> dict[str, Any]:
        """The engine with these findings, which goes on with its cache while they stay the same."""
        findings = Findings(**request["findings"])
        store = self._store
        if store is None:
            raise EngineError("there is no store to read pictures from")
        if self._engine is None or findings != self._findings:
            self._engine = RkllmEngine(
                self._model, self._table, self._tokenizer, store.get, context_rows=self._context_rows, findings=findings
            )
            self._findings = findings
        sampling = Sampling(max_new_tokens=request["max_new"])
        *_, done = self._engine.generate(_pieces(request["rows"]), sampling, should_stop)
        assert isinstance(done, Done)
        return {
            "ids": list(done.ids),
            "n_prompt": done.n_prompt,
            "n_prefilled": done.n_prefilled,
            "strategy": self._engine.strategy,
        }

    def _embeds(self, rows: Sequence[Any]) -> NDArray[np.float32]:
        parts = []
        for item in rows:
            if isinstance(item, int):
                parts.append(self._table.rows([item]))
            else:
                _, seed, n = item
                ids = random.Random(seed).choices(range(min(256, self._table.n_ids)), k=n)
                parts.append(self._table.rows(ids) * np.float32(1.001))  # no token's row to the bit
        return np.ascontiguousarray(np.concatenate(parts))


def _pieces(rows: Sequence[Any]) -> list[Piece]:
    pieces: list[Piece] = []
    for is_ids, group in groupby(rows, lambda item: isinstance(item, int)):
        if is_ids:
            pieces.append(Tokens(tuple(group)))
        else:
            pieces += [ImageRows(key, n) for key, n in group]
    return pieces


def _rss_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
