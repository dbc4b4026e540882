"""The LLM on RKLLM, fed with embeddings: the engine that this project exists for.

RKLLM has five incompatible ABIs (mmchat.rkllm_abi) and no documented answer to what its KV cache holds after a run of
embedding input.  So the engine has three strategies and believes none of them unchecked:

    resend   clear the KV cache and send the whole conversation: right on every version
    prefix   send the whole conversation, the library skips the prefix it knows (1.2.3 and later);
             checked by perf.prefill_tokens; cleared first where the conversation was edited, unless `rewinds`
    append   keep the history and send only what is new; checked by rkllm_get_kv_cache_size

`mmchat calibrate` finds out, on the user's own library and model, which one holds; without its profile it is resend.
A result that does not match the expected counts falls back to resend at once, for good, and says so.

Some libraries crash on runs above a length (airockchip/rknn-llm #123).  No run is longer than `safe_rows`; what is, is
refused, except with append and `chunks`: then it is fed in several runs, each of which must leave exactly its rows in
the cache.  That takes a library that ends a run by itself after one token, which it then does not keep: 1.3.0.  Up to
1.2.3 a run ends by rkllm_abort, and what the cache holds after that nobody knows; and with prefix the whole
conversation is one run, however little of it is new.

What RKLLM cannot do: there is no seed, so sampled answers do not repeat; penalties see the tokens of one run alone,
so not those shown before a crash; up to 1.2.3 sampling is set when the model is loaded (SamplingFixed).

For the LLM worker only: mmchat.rkllm_model loads vendor code.  No board was at hand when this was written: it was
tested against a stand-in library with the real ABI (tests/rkllm_standin).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmchat import rkllm_abi
from mmchat.embed_table import EmbedTable
from mmchat.embedding import RowKey, assemble, common_prefix, row_keys
from mmchat.engine import Done, Event, Piece, Prefill, Sampling, Token, Tokens, check_fits
from mmchat.errors import ContextFull, ModelDirError, PromptError, SamplingFixed
from mmchat.model_dir import MARGIN_ROWS, ModelSpec
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_answer import Answer
from mmchat.rkllm_detect import Detection, detect
from mmchat.rkllm_model import Perf, Returned, RkllmModel, settings

Strategy = Literal["resend", "prefix", "append"]

_CUTS = 3  # attempts to feed a prompt in several runs
_UNCLEAR = 3  # runs, one after the other, after which nobody knows what the cache holds


@dataclass(frozen=True)
class Findings:
    """What calibration found out about one library and model.

    rewinds: with prefix, rows that differ from the cache's are noticed, image rows too.
    safe_rows: the most rows that one run may have; None where no run has crashed.
    chunks: with append, a prompt may be fed in several runs.
    """

    strategy: Strategy = "resend"
    rewinds: bool = False
    safe_rows: int | None = None
    chunks: bool = False


def load_board(
    spec: ModelSpec, library: Path, *, family: str | None = None, context_rows: int, sampling: Sampling
) -> tuple[RkllmModel, EmbedTable, ChatTokenizer, Detection]:
    """Check all that can be checked before the vendor's code runs, then load a board folder's model.

    context_rows: what prompt and answer may take together.  family: the user's word for the library's ABI.

    Raises ModelDirError: files that do not belong together; EngineError: the library (see rkllm_detect), the model.
    """
    if spec.board is None:
        raise ModelDirError(f"{spec.folder}: has no model for RKLLM")
    if not 1 <= context_rows <= spec.context_rows:
        raise ModelDirError(f"a context of {context_rows} rows: {spec.board.llm_path} allows 1 to {spec.context_rows}")
    table, tokenizer = EmbedTable.open(spec.embed_table_path), ChatTokenizer(spec.tokenizer_path)
    table.check_belongs(spec.llm.hidden_size, tokenizer.n_ids)
    if spec.board.stop_ids and tokenizer.stop_ids != spec.board.stop_ids:
        raise ModelDirError(
            f"{spec.tokenizer_path}: answers end with {sorted(tokenizer.stop_ids)}, but with "
            f"{sorted(spec.board.stop_ids)} in mmchat.json"
        )
    found = detect(library, family=family)
    for line in found.evidence:
        print(f"mmchat: {library}: {line}", file=sys.stderr)
    model = RkllmModel(
        library,
        rkllm_abi.FAMILIES[found.family],
        spec.board.llm_path,
        context_rows=min(-(-(context_rows + MARGIN_ROWS) // 32) * 32, spec.llm.context_rows),
        hidden_size=spec.llm.hidden_size,
        n_tokens=tokenizer.n_ids,
        sampling=sampling,
        base_domain=spec.board.base_domain,
    )
    return model, table, tokenizer, found


class RkllmEngine:
    """An Engine (mmchat.engine) over one RkllmModel.  For one thread."""

    def __init__(
        self,
        model: RkllmModel,
        table: EmbedTable,
        tokenizer: ChatTokenizer,
        load_image: Callable[[str], NDArray[np.float32] | None],
        *,
        context_rows: int,
        findings: Findings | None = None,
    ) -> None:
        """context_rows: what prompt and answer may take together; below the model's max_context_len.

        load_image: the embedding under a store key, or None where it is not there.
        """
        self._model, self._table, self._tokenizer, self._load_image = model, table, tokenizer, load_image
        self._context_rows = context_rows
        self.forget(findings or Findings())

    def forget(self, findings: Findings) -> None:
        """Go by these findings, and trust nothing that the KV cache holds: it is cleared before the next run."""
        self._safe_rows, self._rewinds = findings.safe_rows, findings.rewinds
        self.strategy: Strategy = _possible(findings.strategy, self._model.family)
        self._chunks = findings.chunks and self._model.family.run_sampling
        self._n_misfed = self._n_unclear = 0  # in a row
        self._held: list[RowKey] | None = None  # what the KV cache holds; None: nobody knows

    @property
    def context_rows(self) -> int:
        return self._context_rows

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """See Engine.generate.  The first event, Prefill(0, n), comes before the library sees the n rows.

        Raises SamplingFixed for sampling that this library can only set when loading.
        """
        started = time.perf_counter()
        rows = row_keys(pieces)
        if not rows:
            raise PromptError("the prompt is empty")
        check_fits(len(rows), sampling.max_new_tokens, self._context_rows)
        self._check_sampling(sampling)
        answer = Answer(self._tokenizer, sampling, resume_ids, self._model.family.run_sampling)
        wanted = rows + list(resume_ids)
        known = common_prefix(self._held or [], wanted)
        skip = self._skip(wanted, known)
        embeds = assemble([*pieces, Tokens(tuple(resume_ids))], self._table, self._load_image, skip=skip)
        ends = self._cut(len(embeds))

        returned, prefilled = None, started
        if answer.reason is None and not should_stop():
            yield Prefill(0, len(embeds))
            if not skip and not self._may_keep(known):
                self._model.clear()
            self._held = None  # until the run has ended well
            try:
                yield from self._feed(embeds, ends, skip, sampling, should_stop)
            except _Misfed as error:
                self._misfed(error)
                yield from self.generate(pieces, sampling, should_stop, resume_ids=resume_ids)
                return
        if answer.reason is None and not should_stop():
            for message in self._model.run(
                embeds[ends[-1] if ends else 0 :],
                keep_history=self.strategy == "append",
                sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens - len(resume_ids)),
                should_stop=lambda: should_stop() or answer.must_abort,
            ):
                if isinstance(message, Returned):
                    returned = message
                    break
                if prefilled == started:
                    prefilled = time.perf_counter()
                    yield Prefill(len(embeds), len(embeds))
                if (text := answer.push(message)) is not None:
                    yield Token(message.token_id, text)
            assert returned is not None
            answer.end(returned, cancelled=should_stop())
        if prefilled == started:  # nothing was generated
            prefilled = time.perf_counter()
            if answer.reason is not None:
                yield Prefill(len(embeds) if returned else 0, len(embeds) if returned else 0)
        seconds = (prefilled - started, time.perf_counter() - prefilled)
        if returned is not None and returned.perf and not ends:
            seconds = _believable(returned.perf, seconds)

        n_new_rows = self._n_computed(len(wanted), len(embeds), returned)
        # A cancelled run may have finished before the abort, with tokens that were not taken any more.
        is_sure = returned is not None and returned.finished and not returned.aborted and not should_stop()
        if returned is not None and is_sure and answer.complete:
            self._held = self._after(wanted, answer, known=known, perf=returned.perf)
        n_reused = min(len(wanted) - n_new_rows, len(rows))
        cancelled = answer.reason is None
        yield Done(
            reason="cancelled" if answer.reason is None else answer.reason,
            text=answer.stream.finish(),
            ids=answer.spelled(),
            n_prompt=len(rows),
            n_reused=0 if cancelled and returned is None else n_reused,
            n_prefilled=0 if cancelled and returned is None else len(rows) - n_reused,
            n_new=len(answer.ids),
            prefill_s=seconds[0],
            generate_s=seconds[1],
        )

    def _check_sampling(self, sampling: Sampling) -> None:
        wanted, loaded = settings(sampling), settings(self._model.loaded_sampling)
        differ = [name for name in wanted if wanted[name] != loaded[name]]
        if differ and not self._model.family.run_sampling:
            raise SamplingFixed(
                f"RKLLM {self._model.family.name} sets {', '.join(differ)} only when the model is loaded: "
                "it must be loaded again for other values"
            )

    def _skip(self, wanted: list[RowKey], known: int) -> int:
        """Rows that need not be sent, since they are in the KV cache and stay there."""
        if self.strategy != "append" or not self._held or known < len(self._held) or known >= len(wanted):
            return 0
        return known if self._model.kv_rows() == len(self._held) else 0

    def _may_keep(self, known: int) -> bool:
        """Whether the library may look for the prefix by itself: only where nothing in its cache can mislead it."""
        return self.strategy == "prefix" and self._held is not None and (self._rewinds or known == len(self._held))

    def _cut(self, n_rows: int) -> list[int]:
        """Where the runs end, but for the last, that n_rows are fed in.  Raises ContextFull where one must do."""
        if self._safe_rows is None or n_rows <= self._safe_rows:
            return []
        length = self._safe_rows - self._n_misfed
        if self.strategy != "append" or not self._chunks or length < 1:
            raise ContextFull(n_rows, 0, self._safe_rows)
        return list(range(length, n_rows, length))

    def _feed(
        self,
        embeds: NDArray[np.float32],
        ends: Sequence[int],
        n_held: int,
        sampling: Sampling,
        should_stop: Callable[[], bool],
    ) -> Iterator[Prefill]:
        """Put all rows before the last of `ends` behind n_held rows; the token that each run generates is dropped.

        Raises _Misfed where the cache then holds another number of rows.
        """
        start = 0
        for end in ends:
            returned = None
            for message in self._model.run(
                embeds[start:end],
                keep_history=True,
                sampling=replace(sampling, max_new_tokens=1),
                should_stop=should_stop,
            ):
                returned = message
            assert isinstance(returned, Returned)
            if returned.aborted:
                return
            returned.check()
            if (kv := self._model.kv_rows()) != n_held + end:
                raise _Misfed(f"{kv} rows are cached where {n_held + end} were sent")
            yield Prefill(end, len(embeds))
            start = end
        self._n_misfed = 0

    def _misfed(self, error: _Misfed) -> None:
        """Where the dropped token ends an answer the library may keep it: runs that end elsewhere are tried."""
        self._n_misfed += 1
        print(f"mmchat: {error}; once more with shorter runs", file=sys.stderr)
        if self._n_misfed == _CUTS:
            self._distrust(str(error))

    def _n_computed(self, n_wanted: int, n_sent: int, returned: Returned | None) -> int:
        """Of the rows that the cache should hold before the answer, those that were computed now."""
        if returned is None:
            return 0
        if self.strategy != "prefix" or returned.perf is None:
            return n_sent
        return min(max(returned.perf.prefilled, 1), n_wanted)  # the last row is computed even in a whole hit

    def _after(self, wanted: list[RowKey], answer: Answer, *, known: int, perf: Perf | None) -> list[RowKey] | None:
        """What the KV cache holds after a run that ended by itself; None where the counts do not add up."""
        if self.strategy == "resend":
            return None
        n_answer = len(answer.ids) - answer.n_resumed
        if self.strategy == "prefix" and perf is not None and perf.prefilled < len(wanted) - known:
            self._distrust(f"{perf.prefilled} rows were prefilled where {len(wanted) - known} were new")
            return None
        kv = self._model.kv_rows()
        n_fed = -1 if kv is None else kv - len(wanted)
        fed: list[RowKey] = [*wanted, *answer.ids[answer.n_resumed :]]
        n_unclear, self._n_unclear = self._n_unclear, 0
        if n_fed == n_answer + 1 and answer.stop_id is not None:
            return [*fed, answer.stop_id]
        if max(0, n_answer - 1) <= n_fed <= n_answer:
            return fed[: len(wanted) + n_fed]
        self._n_unclear = n_unclear + 1
        if self.strategy == "append" or self._n_unclear == _UNCLEAR:
            self._distrust(f"{kv} rows are cached where {len(wanted)} were sent and {n_answer} generated")
        return None

    def _distrust(self, why: str) -> None:
        print(f"mmchat: this library does not keep to {self.strategy} ({why}); from now on resend", file=sys.stderr)
        self.strategy = "resend"


def _believable(perf: Perf, measured: tuple[float, float]) -> tuple[float, float]:
    """Seconds of prefill and of decoding: the library's own, where they fit into what was measured around them."""
    told = (perf.prefill_s, perf.generate_s)
    return told if min(told) >= 0 and 0 < sum(told) <= sum(measured) else measured


class _Misfed(Exception):
    """A part of a prompt did not leave exactly its rows in the cache."""


def _possible(strategy: Strategy, family: rkllm_abi.Family) -> Strategy:
    """The strategy, where the ABI has what its checks need."""
    if strategy == "append" and not (family.keep_history and family.kv_cache_size):
        return "resend"
    if strategy == "prefix" and not family.perf:
        return "resend"
    return strategy
