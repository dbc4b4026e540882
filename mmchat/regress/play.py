"""Play a talk on a runtime, and check what must hold (mmchat.regress.broken lists it).

The talk is played as a chat would be, from an emptied cache on, in the runtime's own strategy.  Then the requests that
the engine was sent are sent again: each from an emptied cache, with its pictures encoded once more, and all in a row in
every other strategy that calibration allows.  Answers are compared over their first tokens, for later ones may differ
where sums are taken in another order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np

from mmchat.engine import ImageRows, Piece
from mmchat.errors import ContextFull, ImageError, MmchatError
from mmchat.probe_runs import EQUAL_TOKENS
from mmchat.prompt import Message, RowCounter
from mmchat.record import ImageHandle, Turn
from mmchat.regress.broken import AnswersDiffer, CapExceeded, CountsWrong, Crashed, PicturesDiffer, StrategiesDiffer
from mmchat.regress.rows import fill
from mmchat.regress.talk import Step, Talk
from mmchat.regress.watch import Request, Watch
from mmchat.runtime import Runtime
from mmchat.session import Reply, Session

_LONG_ROWS = 512  # the very same run is not made once more where it has more than these
_TOLERANCE = 1e-3  # of embeddings; threads may add in another order
GREEDY = {"temperature": 0.0}


class Player:
    """Plays talks on one runtime, which is watched from now on.  n_talks, n_turns: played so far."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.watch = Watch(runtime)
        runtime.engine = self.watch
        profile = runtime.rkllm.profile if runtime.rkllm else None
        self.strategies = profile.allowed if profile else (None,)
        self._counter = RowCounter(runtime.tokenizer, query_num=runtime.spec.vision.query_num)
        self._again: dict[str, str] = {}  # keys of pictures -> keys under which they were encoded once more
        self.n_talks = self.n_turns = 0

    def play(self, talk: Talk) -> None:
        """Raises Broken; RegressError (a picture of a file that cannot be read)."""
        self.n_talks += 1
        own = self.strategies[0]
        self.watch.forget(own)
        images = _Conversations(self, talk).play()
        told, used = self.watch.requests, self.watch.forget(own)
        self._check_kept(own, used)
        self._check_pictures(images)
        self._check_fresh(told)
        for other in self.strategies[1:]:
            if other != "resend":  # which is what a fresh answer is
                self._check_strategy(told, other)

    def _check_kept(self, strategy: str | None, used: str) -> None:
        if strategy is not None and used != strategy:
            why = [line for line in self.runtime.llm.worker.log_tail.splitlines() if "does not keep to" in line]
            raise StrategiesDiffer(f"the engine gave {strategy} up: {why[-1] if why else 'its log has no word of it'}")

    def _check_pictures(self, images: Iterable[ImageHandle]) -> None:
        """Encode them once more, under other keys."""
        store = self.runtime.store
        for image in images:
            todo = {key for key in image.keys if key not in self._again or not store.peek(self._again[key])}
            if not todo:
                continue
            pixels = {key: cut for key, cut in zip(image.keys, image.pixels(), strict=True) if key in todo}
            again = {key: hashlib.sha256(os.urandom(16)).hexdigest() for key in pixels}
            slices = {again[key]: cut for key, cut in pixels.items()}
            try:
                done = self.runtime.vision.encode(list(slices.items()))
            except MmchatError as error:
                raise Crashed(f"encoding a picture of {_by(image)}: {error}") from None
            if done.restarts:
                raise Crashed(f"the encoder died over a picture of {_by(image)}, and was replaced")
            for key, other in again.items():
                old, new = store.get(key), store.get(other)
                if old is None or new is None:
                    raise PicturesDiffer(f"an embedding of a picture of {_by(image)} is not in the store")
                if not np.allclose(old, new, rtol=_TOLERANCE, atol=_TOLERANCE):
                    raise PicturesDiffer(
                        f"a slice of a picture of {_by(image)} has other rows when it is encoded again, by up to "
                        f"{np.abs(old - new).max():.3g}"
                    )
            self._again.update(again)

    def _check_fresh(self, told: Sequence[Request]) -> None:
        """Each request alone, from an emptied cache, with the pictures' second embeddings."""
        fresh = "resend" if self.runtime.rkllm else None
        seen = set()
        for number, request in enumerate(told, 1):
            key = (request.pieces, request.sampling)
            is_same = number == 1 and fresh == self.strategies[0] and request.n_rows > _LONG_ROWS
            if key in seen or not request.ids or is_same:
                continue
            seen.add(key)
            self.watch.forget(fresh)
            again = self.watch.again(request, [self._renewed(piece) for piece in request.pieces])
            if again is not None and (difference := _difference(request, again)):
                kind = AnswersDiffer if self.strategies[0] in (None, "resend") else StrategiesDiffer
                raise kind(f"request {number} of {request.n_rows} rows: {difference} from an emptied cache")

    def _check_strategy(self, told: Sequence[Request], strategy: str | None) -> None:
        self.watch.forget(strategy)
        for number, request in enumerate(told, 1):
            again = self.watch.again(request, request.pieces)
            if again is not None and (difference := _difference(request, again)):
                raise StrategiesDiffer(f"request {number} of {request.n_rows} rows: {difference} with {strategy}")
        self._check_kept(strategy, self.watch.forget(self.strategies[0]))

    def _renewed(self, piece: Piece) -> Piece:
        if isinstance(piece, ImageRows):
            return ImageRows(self._again.get(piece.key, piece.key), piece.n_rows)
        return piece


def _difference(first: Request, second: Request) -> str:
    """In words; "" where there is none."""
    n = EQUAL_TOKENS
    if "cancelled" in (first.done and first.done.reason, second.done and second.done.reason):
        n = min(n, len(first.ids), len(second.ids))
    if first.ids[:n] == second.ids[:n]:
        return ""
    return f"tokens {first.ids[:n]} in the conversation, {second.ids[:n]}"


class _Conversations:
    """The sessions of one talk."""

    def __init__(self, player: Player, talk: Talk) -> None:
        self._player, self._talk = player, talk
        self._runtime, self._watch, self._counter = player.runtime, player.watch, player._counter
        self._sessions: dict[int, Session] = {}
        self._exact = False  # the question's rows are known beforehand
        self._sent: dict[int, tuple[Piece, ...]] = {}  # by the turn that came of it
        self._turns: list[Turn] = []  # those, so that their ids stay theirs

    def play(self) -> list[ImageHandle]:
        """Returns the pictures that were sent."""
        images: dict[tuple[str, ...], ImageHandle] = {}
        for step in self._talk.steps:
            if step.session not in self._sessions:
                policy = None if self._talk.policy == "trim" else self._talk.policy
                self._sessions[step.session] = self._runtime.session(policy=policy)
            session = self._sessions[step.session]
            self._do(step, session)
            images.update((image.keys, image) for image in session.images)
        return list(images.values())

    def _do(self, step: Step, session: Session) -> None:
        n_turns, self._exact = len(session.turns), False
        if step.do == "undo" and n_turns:
            session.undo(min(step.turn, n_turns))
        elif step.do == "branch":
            self._sessions[step.to] = session.branch(min(step.turn, n_turns))
        elif step.do == "again" and n_turns:
            before = session.turns[-1]
            self._ask(step, session, session.regenerate(**_sampling(step)), base=n_turns - 1)
            after = session.turns[-1]
            is_comparable = "cancelled" not in (before.stop_reason, after.stop_reason)
            # More room for the answer may have cost the prompt something.
            is_comparable = is_comparable and self._sent.get(id(before)) == self._sent.get(id(after))
            if is_comparable and not _same(before.ids, after.ids):
                raise AnswersDiffer(f"asked again, {list(after.ids[:EQUAL_TOKENS])} after {list(before.ids)}")
        elif step.do in ("ask", "edit"):
            edits = step.do == "edit" and n_turns > 0
            base = min(step.turn, n_turns) - 1 if edits else n_turns
            text = self._text(step, session, base)
            pictures = [sketch.draw() for sketch in step.pictures]
            try:
                reply = (
                    session.edit(base + 1, text, pictures, **_sampling(step))
                    if edits
                    else session.ask(text, pictures, **_sampling(step))
                )
            except ImageError:  # refused before anything was sent
                return
            self._ask(step, session, reply, base=base)

    def _text(self, step: Step, session: Session, base: int) -> str:
        self._exact = bool(step.rows) and not step.pictures
        if not step.rows:
            return step.text
        asked = session.branch(base)
        text = fill(step.rows, lambda text: asked.prompt((text,)).n_rows)
        self._exact = self._exact and asked.prompt((text,)).n_rows == step.rows
        return text

    def _ask(self, step: Step, session: Session, reply: Reply, *, base: int) -> None:
        player, watch = self._player, self._watch
        player.n_turns += 1
        before, n_requests, prompt_rows = session.turns, len(watch.requests), self._runtime.llm.prompt_rows
        if step.cancel_after == 0:
            reply.on_wait = lambda stage, done, total: reply.cancel()
        try:
            for number, _ in enumerate(reply, 1):
                if number == step.cancel_after:
                    break
        except ContextFull as error:
            self._check_refusal(step, error, prompt_rows)
            if session.turns != before or len(watch.requests) != n_requests:
                raise CapExceeded("a question that was refused left something behind") from None
            return
        except MmchatError as error:
            raise Crashed(f"{type(error).__name__}: {error}", watch.rows) from None
        usage = reply.usage
        if usage.restarts:
            raise Crashed("the encoder died, and was replaced")
        if len(watch.requests) == n_requests:  # cancelled before it was sent
            return
        request = watch.requests[-1]
        done = request.done
        assert done is not None
        _check(usage.n_prompt == request.n_rows == reply.plan.rows, f"{request.n_rows} rows were sent: {usage}")
        _check((usage.n_reused, usage.n_prefilled) == (done.n_reused, done.n_prefilled), f"not {done}: {usage}")
        if self._exact and self._talk.policy == "error":
            _check(usage.n_prompt == step.rows, f"a prompt of {step.rows} rows: {usage}")
        if step.cancel_after == 0 or session.turns == before:
            return
        turn = session.turns[-1]
        self._turns.append(turn)
        self._sent[id(turn)] = request.pieces
        _check(len(session.turns) == base + 1, f"{len(session.turns)} turns are there after turn {base + 1}")
        n_slices = sum(image.slices for image in turn.images)
        _check(usage.slices_encoded + usage.slices_cached == n_slices, f"{n_slices} slices: {usage}")
        n_record = session.prompt().n_rows - self._counter.message(Message("assistant", ids=turn.ids))
        _check(n_record == usage.n_prompt, f"{n_record} rows of the record come before the answer: {usage}")
        text = b"".join(map(self._runtime.tokenizer.token_bytes, turn.ids))
        if _is_whole(text):
            _check(text.decode() == turn.text, f"tokens {list(turn.ids)} spell {text.decode()!r}, not {turn.text!r}")

    def _check_refusal(self, step: Step, error: ContextFull, prompt_rows: int) -> None:
        """Right only where it does not fit."""
        if error.n_prompt + error.max_new_tokens <= error.limit:
            raise CapExceeded(f"refused, though it fits: {error}") from None
        allowed = prompt_rows if error.max_new_tokens == 0 else self._watch.context_rows
        if error.limit != allowed:
            raise CapExceeded(f"refused by a limit of {error.limit} rows where {allowed} are allowed: {error}")
        if self._exact and self._talk.policy == "error" and error.n_prompt != step.rows:
            raise CountsWrong(f"a prompt of {step.rows} rows is counted as {error.n_prompt}")


def _sampling(step: Step) -> dict[str, float]:
    return {**GREEDY, "max_new_tokens": step.max_new_tokens}


def _same(first: Sequence[int], second: Sequence[int]) -> bool:
    """As far as both go: one may have been allowed fewer tokens."""
    n = min(EQUAL_TOKENS, len(first), len(second))
    return tuple(first[:n]) == tuple(second[:n])


def _check(good: bool, what: str) -> None:
    if not good:
        raise CountsWrong(what)


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _by(image: ImageHandle) -> str:
    return f"{image.size[0]}x{image.size[1]}"
