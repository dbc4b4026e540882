"""An engine between sessions and the LLM's client, which sees every request and lets no crash be healed in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mmchat.embedding import RowKey, common_prefix, row_keys
from mmchat.engine import Done, Event, Piece, Restarted, Sampling, Token
from mmchat.errors import ContextFull, EngineError, MissingEmbeddings
from mmchat.regress.broken import CapExceeded, CountsWrong, Crashed
from mmchat.runtime import Runtime

# A run may be silent for so long: some boards prefill 40 rows per second, and the first run may be slow.
_SILENCE_S, _ROWS_PER_S = 20.0, 5.0


@dataclass
class Request:
    """What the engine was asked, and what it answered: the tokens, and its last word."""

    pieces: tuple[Piece, ...]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    done: Done | None = None

    @property
    def n_rows(self) -> int:
        return sum(piece.n_rows for piece in self.pieces)


class Watch:
    """An Engine (mmchat.engine).  Raises Crashed, CapExceeded, CountsWrong beside what the client raises.

    requests: since the last forget.  rows: of the last request.  n_rows, longest: rows in all, and of one request.
    worked: rows of the longest request that was answered.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.client = runtime.llm
        self.requests: list[Request] = []
        self.rows = self.n_rows = self.longest = self.worked = self.n_requests = 0
        self._strategy = "rewind"

    @property
    def context_rows(self) -> int:
        return self.client.context_rows

    def forget(self, strategy: str | None = None) -> str:
        """See LlmClient.forget.  strategy: None where the engine has only one."""
        self.client.silence_s = None  # it may have to load the model
        try:
            before = self.client.forget(strategy)
        except EngineError as error:
            raise Crashed(f"the model does not load ({error})", 0) from None
        self.requests, self._strategy = [], strategy or "rewind"
        return before

    def generate(
        self,
        pieces: Sequence[Piece],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        resume_ids: Sequence[int] = (),
    ) -> Iterator[Event]:
        """See Engine.generate."""
        request = Request(tuple(pieces), sampling)
        self._check_cap(request)
        self.rows = request.n_rows
        self.n_requests, self.n_rows, self.longest = (
            self.n_requests + 1, self.n_rows + self.rows, max(self.longest, self.rows)
        )  # fmt: skip
        self.client.silence_s = _SILENCE_S + self.rows / _ROWS_PER_S
        try:
            for event in self.client.generate(pieces, sampling, should_stop, resume_ids=resume_ids):
                if isinstance(event, Restarted):
                    raise Crashed(f"a prompt of {self.rows} rows: {event.why}", self.rows)
                if isinstance(event, Token):
                    request.ids.append(event.id)
                if isinstance(event, Done):
                    request.done = event
                    self._check_counts(request, event)
                    self.requests.append(request)
                    self.worked = max(self.worked, self.rows)
                yield event
        except EngineError as error:
            raise Crashed(f"a prompt of {self.rows} rows: {error}", self.rows) from None

    def _check_cap(self, request: Request) -> None:
        rows, room = request.n_rows, request.sampling.max_new_tokens
        if rows + room > self.context_rows:
            raise CapExceeded(f"{rows} rows and {room} for the answer were sent to an engine of {self.context_rows}")

    def _check_counts(self, request: Request, done: Done) -> None:
        def check(good: bool, what: str) -> None:
            if not good:
                raise CountsWrong(f"{what}: {done}")

        rows, counted = request.n_rows, done.n_reused + done.n_prefilled
        ended = done.reason != "cancelled"
        check(done.n_prompt == rows, f"{rows} rows were sent")
        check(counted == rows if ended else counted <= rows, "reused and prefilled rows are not the prompt's")
        check(min(done.n_reused, done.n_prefilled, done.n_new) >= 0, "a count is below 0")
        check(not ended or done.n_new == len(request.ids), f"{len(request.ids)} tokens came")
        check(done.n_new <= request.sampling.max_new_tokens, f"{request.sampling.max_new_tokens} tokens were allowed")
        check(done.reason != "length" or done.n_new == request.sampling.max_new_tokens, "ended for its length too soon")
        if rows + done.n_new > self.context_rows:
            raise CapExceeded(f"the context holds {self.context_rows} rows: {done}")
        wanted = row_keys(request.pieces)
        known = 0 if self._strategy == "resend" else max((_common(wanted, old) for old in self.requests), default=0)
        check(done.n_reused <= known, f"{known} rows could be known at most")

    def again(self, request: Request, pieces: Sequence[Piece]) -> Request | None:
        """The same request once more, with these pieces; stopped where it was stopped.

        None where it does not fit one run of this strategy, or the store has dropped a picture since.
        """
        cancelled = request.done is not None and request.done.reason == "cancelled"
        tokens: list[Token] = []

        def enough() -> bool:
            return cancelled and len(tokens) >= len(request.ids)

        try:
            for event in self.generate(pieces, request.sampling, enough):
                if isinstance(event, Token):
                    tokens.append(event)
        except (ContextFull, MissingEmbeddings):
            return None
        return self.requests[-1]


def _common(wanted: list[RowKey], old: Request) -> int:
    """Rows that both begin with; an end token that the library kept is one more."""
    held = [*row_keys(old.pieces), *old.ids]
    n = common_prefix(held, wanted)
    return n + (n == len(held) and old.done is not None and old.done.reason == "stop")
