"""What is asked about pictures, and the answers."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmchat.errors import ContextFull, EngineError, ImageError, MmchatError, StoreError, VideoError
from mmchat.record import Usage
from mmchat.video.gate import Gate
from mmchat.video.pace import Pace
from mmchat.video.values import Caption, Shot, clock

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmchat.engine import StopReason
    from mmchat.runtime import Runtime
    from mmchat.session import Reply, Session

ASK_FRAME = "Describe the image."
ASK_WINDOW = "Describe what happens in these images."
# A caption is short, and the same frame gets the same one.
SAMPLING: dict[str, Any] = {"max_new_tokens": 128, "temperature": 0.0, "seed": 0}
_FAILURES = 3  # one after the other, then it is no longer the frame's fault


@dataclass(frozen=True)
class Plan:
    """How to caption.

    ask: the question; "" is one that fits.  system: the system prompt; None is the model's.
    pace: which frames.  changed: see Gate; 0 asks about every frame.
    window: frames per question.  story: how many of the last captions go with the question.
    max_slice_nums: cells per picture at most; 1 never cuts.  use_image_id: number the pictures.
    question_first: the question before the pictures, where it stays in the KV cache; models are mostly trained on
        the other order.
    sampling: fields of mmchat.engine.Sampling; at most 128 tokens and temperature 0 unless it says otherwise.
    """

    ask: str = ""
    system: str | None = None
    pace: Pace = field(default_factory=Pace)
    changed: float = 0.0
    window: int = 1
    story: int = 0
    max_slice_nums: int = 1
    use_image_id: bool = False
    question_first: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises VideoError."""
        for name, value, least in (("window", self.window, 1), ("story", self.story, 0)):
            if value < least:
                raise VideoError(f"{name} is {value}; it must be at least {least}")
        Gate(self.changed)

    @property
    def question(self) -> str:
        return self.ask or (ASK_FRAME if self.window == 1 else ASK_WINDOW)


@dataclass
class Job:
    """A window whose pictures were read.

    pictures: those that changed, or the last one where none did.  reply: the question about them, ready to run.
    before: an earlier run passed here; known: the caption that it kept.
    """

    shots: tuple[Shot, ...]
    pictures: list[Image]
    changed: bool
    digest: str
    reply: Reply | None = None
    thumbnail: bytes | None = None
    before: bool = False
    known: Caption | None = None


class Asker:
    """Makes questions about pictures."""

    def __init__(self, rt: Runtime, plan: Plan) -> None:
        self.rt, self.plan = rt, plan
        self._sampling = {**SAMPLING, **plan.sampling}
        self._ahead: Reply | None = None

    def session(self) -> Session:
        plan = self.plan
        return self.rt.session(plan.system, max_slice_nums=plan.max_slice_nums, use_image_id=plan.use_image_id)

    def ask(self, pictures: Sequence[Image], story: Sequence[Caption] = ()) -> Reply:
        """Cuts the pictures.  Raises ImageError."""
        told = "\n".join(f"[{clock(caption.time)}] {caption.text}" for caption in story)
        parts: list[str | Image] = [*([f"Before:\n{told}"] if told else []), *pictures]
        question = self.plan.question
        ordered: list[str | Image] = [question, *parts] if self.plan.question_first else [*parts, question]
        return self.session().ask(ordered, **self._sampling)

    def encode_ahead(self, reply: Reply) -> None:
        """A failure is no news yet: the answer will meet it again."""
        self._ahead = reply
        with contextlib.suppress(MmchatError):
            reply.encode_ahead()

    def cancel(self) -> None:
        """End the encoding that is under way in another thread."""
        if self._ahead is not None:
            self._ahead.cancel()


class Answers:
    """Runs questions; knows the last answer, the story so far, and how many failed one after the other."""

    def __init__(self, asker: Asker, on_notice: Callable[[str], None]) -> None:
        self._asker, self._on_notice = asker, on_notice
        self._last: Caption | None = None
        self._story: deque[Caption] = deque(maxlen=asker.plan.story)
        self._n_failed = 0

    def remember(self, caption: Caption | None) -> None:
        """What the answer was; None where there was none, or it was not kept."""
        self._last = caption
        if caption is not None and not caption.carried:
            self._story.append(replace(caption, thumbnail=None))

    def caption(self, job: Job, drops: int, skipped: int) -> Caption | None:
        """None where the answer failed, which was told.  Raises MmchatError where that was not the frame's fault."""
        first = job.shots[0].frame
        made = Caption(
            time=round(first.time, 6),
            end=round(job.shots[-1].end, 6),
            index=first.index,
            text=self._last.text if self._last else "",
            carried=True,
            digest=job.digest,
            drops=drops,
            skipped=skipped,
            frames=len(job.shots),
            name=first.name,
            stop_reason=self._last.stop_reason if self._last else "stop",
            at=first.at,
            thumbnail=job.thumbnail,
        )
        if job.changed or self._last is None:
            try:
                text, reason, usage = self._answer(job)
            except (EngineError, StoreError, ImageError) as error:
                self._n_failed += 1
                self._last = None
                if self._n_failed == _FAILURES:
                    raise
                self._on_notice(f"frame {first.index} ({clock(first.time)}) not captioned: {error}")
                return None
            made = replace(made, carried=False, text=text, stop_reason=reason, usage=usage)
        self._n_failed = 0
        self.remember(made)
        return made

    def _answer(self, job: Job) -> tuple[str, StopReason, Usage]:
        ahead = job.reply.usage_so_far if job.reply else Usage()
        story = list(self._story)
        while True:
            reply = self._asker.ask(job.pictures, story) if story or job.reply is None else job.reply
            try:
                text = reply.text
            except ContextFull:
                if not story:
                    raise
                del story[0]  # a shorter one, this time
                continue
            usage = reply.usage
            if reply is not job.reply:
                n = ahead.slices_encoded  # it found these in the store
                usage = replace(
                    usage,
                    slices_encoded=usage.slices_encoded + n,
                    slices_cached=max(0, usage.slices_cached - n),
                    encode_s=usage.encode_s + ahead.encode_s,
                    restarts=usage.restarts + ahead.restarts,
                )
            return text.strip(), reply.stop_reason, usage
