"""The captioning loop.

    source -> pace -> windows -> gate -> cut, encode -> | -> ask -> Caption
    `---------- ahead, in a thread of its own ---------´     the caller's thread

Of a live source the thread ends after the windows, and hands over the newest one only.  Every question is a
conversation of its own that begins alike (the system prompt; with question_first the question as well), so the
engine rewinds to that beginning and the cost of a frame is the same for the first and the millionth.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmchat.errors import ImageError, MmchatError, VideoError
from mmchat.video.asking import Answers, Asker, Job, Plan
from mmchat.video.feed import Feed
from mmchat.video.gate import Gate
from mmchat.video.pace import Pace
from mmchat.video.resume import Before, BeforeLive
from mmchat.video.sources import open_source
from mmchat.video.values import Caption, Notice, Shot, Source, clock

if TYPE_CHECKING:
    import os

    from PIL.Image import Image

    from mmchat.runtime import Runtime

_THUMBNAIL = (320, 320)
_LOG = logging.getLogger("mmchat")


def captions(
    rt: Runtime,
    source: str | os.PathLike[str] | Source | Iterable[Any],
    ask: str = "",
    *,
    every: float = 1.0,
    max_frames: int | None = None,
    official: bool = False,
    changed: float = 0.0,
    window: int = 1,
    story: int = 0,
    system: str | None = None,
    max_slice_nums: int | None = None,
    use_image_id: bool = False,
    question_first: bool = False,
    ahead: bool = True,
    thumbnails: bool = False,
    after: Iterable[Caption] = (),
    on_notice: Callable[[str], None] | None = None,
    **sampling: Any,
) -> Generator[Caption, None, None]:
    """Captions of a source's frames, as they are made.

    source: see mmchat.video.open_source.  The rest of the question is described in Plan, Pace and Gate; official
        takes the published recipe's frames, and 2 slices unless max_slice_nums says otherwise (else it is 1).
    ahead: read, cut and encode the next frame while one is answered.  thumbnails: give captions one.
    after: captions that an earlier run made of the same source with the same plan: they are not made again, and not
        given again; of a live source, times and numbers go on after the last one.
    on_notice: told about bad frames, reconnections and failed answers; the logger "mmchat" where there is none.

    Closing the iterator ends the thread.  Raises VideoError (source, plan, `after` belongs to another source), and
    what Session.ask raises; an answer that fails is a notice, and three one after the other an error.
    """
    plan = Plan(
        ask=ask,
        system=system,
        pace=Pace(every, max_frames, official),
        changed=changed,
        window=window,
        story=story,
        max_slice_nums=(2 if official else 1) if max_slice_nums is None else max_slice_nums,
        use_image_id=use_image_id,
        question_first=question_first,
        sampling=sampling,
    )
    return follow(rt, open_source(source), plan, ahead=ahead, thumbnails=thumbnails, after=after, on_notice=on_notice)


def follow(
    rt: Runtime,
    source: Source,
    plan: Plan,
    *,
    ahead: bool = True,
    thumbnails: bool = False,
    after: Iterable[Caption] = (),
    on_notice: Callable[[str], None] | None = None,
) -> Generator[Caption, None, None]:
    """See captions."""
    asker = Asker(rt, plan)
    asker.session()  # refuses an impossible max_slice_nums now
    return _follow(asker, source, ahead, thumbnails, after, on_notice or _LOG.warning)


def _follow(
    asker: Asker,
    source: Source,
    ahead: bool,
    thumbnails: bool,
    after: Iterable[Caption],
    on_notice: Callable[[str], None],
) -> Generator[Caption, None, None]:
    plan, stop = asker.plan, threading.Event()
    before: Before = BeforeLive(after) if source.live else Before(after)
    if source.live:
        asker.rt.ready()  # else the first frame would be as old as the loading takes
    n_passed = n_bad = n_frames = 0
    is_barren = True
    held: list[str] = []
    replaying = before.left
    with contextlib.ExitStack() as threads:
        windows: Generator[_Window | Notice, None, None]
        windows = _windows(plan.pace.shots(source.frames(stop), source), plan.window)
        newest = Feed(windows, newest=True, weight=_n_frames) if source.live else None
        if newest:
            threads.callback(newest.close)
        ahead = ahead and not source.live
        jobs = _jobs(newest or windows, asker, before, thumbnails, ahead and asker.rt.parallel)
        feed = Feed(jobs, depth=2) if ahead else None
        if feed:
            threads.callback(feed.close)
        threads.callback(stop.set)
        threads.callback(asker.cancel)  # it is the first of these to be called
        answers = Answers(asker, on_notice)
        for job in feed or jobs:
            if isinstance(job, Notice):
                n_bad += job.bad_frame
                held.append(job.text)
            elif job.before:
                n_bad, held, is_barren = 0, [], False  # the earlier run told
                n_frames += len(job.shots)
                answers.remember(job.known)
            else:
                replaying = False
            while held and not replaying:
                on_notice(held.pop(0))
            if isinstance(job, Notice) or job.before:
                continue
            drops = newest.passed_over - n_passed if newest else 0
            n_frames += len(job.shots)
            caption = answers.caption(job, drops, n_bad)
            if caption is not None:
                n_passed, n_bad, is_barren = n_passed + drops, 0, False
                yield before.shifted(caption)
            if source.live and n_frames >= (plan.pace.most or n_frames + 1):
                break
        before.check_reached(source.name)
        if not n_frames:
            raise VideoError(f"{source.name}: not one frame could be read")
        if is_barren:
            raise VideoError(f"{source.name}: not one frame could be captioned")


def _n_frames(item: _Window | Notice) -> int:
    return 0 if isinstance(item, Notice) else len(item)


_Window = tuple[Shot, ...]


def _windows(shots: Iterator[Shot | Notice], size: int) -> Generator[_Window | Notice, None, None]:
    window: list[Shot] = []
    for shot in shots:
        if isinstance(shot, Notice):
            yield shot
            continue
        window.append(shot)
        if len(window) == size:
            yield tuple(window)
            window = []
    if window:
        yield tuple(window)


def _jobs(
    windows: Iterable[_Window | Notice], asker: Asker, before: Before, thumbnails: bool, encode: bool
) -> Generator[Job | Notice, None, None]:
    gate = Gate(asker.plan.changed)
    for window in windows:
        if isinstance(window, Notice):
            yield window
            continue
        shots, pictures, changed = [], [], []
        for shot in window:
            try:
                pictures.append(shot.frame.read())
            except (ImageError, VideoError) as error:
                yield _skipped(shot, error)
                continue
            shots.append(shot)
            changed.append(gate.lets(pictures[-1]))
        if not shots:
            continue
        fresh = [picture for picture, new in zip(pictures, changed, strict=True) if new]
        job = Job(tuple(shots), fresh or pictures[-1:], bool(fresh), _digest(pictures))
        job.before, job.known = before.look_up(shots[0].frame.index, job.digest)
        if not job.before:
            if thumbnails:
                job.thumbnail = _thumbnail(job.pictures[0])
            if job.changed:
                try:
                    job.reply = asker.ask(job.pictures)
                except ImageError as error:  # no plan cuts a picture of that shape
                    yield _skipped(shots[0], error)
                    continue
                if encode:
                    asker.encode_ahead(job.reply)
        yield job


def _skipped(shot: Shot, error: MmchatError) -> Notice:
    return Notice(f"frame {shot.frame.index} ({clock(shot.frame.time)}) skipped: {error}", bad_frame=True)


def _digest(pictures: Sequence[Image]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.width}x{picture.height}\n".encode() + picture.tobytes())
    return digest.hexdigest()


def _thumbnail(picture: Image) -> bytes:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail(_THUMBNAIL)
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
