"""A conversation: the record of its turns, and how one more comes about.

    state       call                        becomes
    idle        ask                         idle (a Reply that has not run)
    idle        iterate the reply           running
    running     the answer ends             idle, the turn recorded
    running     cancel, close, Ctrl-C       idle, recorded as far as it was shown ("cancelled"); nothing shown, no turn
    running     error                       idle, nothing recorded
    running     iterate another reply, undo SessionError

The record is the truth; what the engine's KV cache holds is its own business.  Every turn sends the whole
conversation as pieces.  This module knows no template, no pixels and no processes: it is handed an Engine and a
Vision.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmchat.bundle import Bundle, Journal, SavedRecord, SavedSettings, set_aside
from mmchat.decoding import ids_of_text
from mmchat.engine import Done, Engine, Prefill, Restarted, Sampling, StopReason, Token, Vision, check_fits
from mmchat.errors import EngineBusy, ImageError, MissingEmbeddings, MmchatError, SessionError
from mmchat.images import open_image
from mmchat.model_dir import ModelSpec
from mmchat.prompt import ChatTokenizer, Message, Picture, Prompt, Text, render
from mmchat.record import ImageHandle, Original, Turn, Usage, keep
from mmchat.saving import Keeper, Restored, saved_model
from mmchat.slicing import Size, SlicePlan, plan_slices, slice_image
from mmchat.store import Store, slice_key

if TYPE_CHECKING:
    from mmchat.images import ImageSource

_LOG = logging.getLogger("mmchat")


class Session:
    """A conversation.  Made by Runtime.session and Runtime.load; for one thread at a time.

    notes: what was lost or had to be made again when it was loaded, in words.
    unsaved: why the last turn is not in the file that autosave names; None where it is, or there is none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: ChatTokenizer,
        store: Store,
        vision: Vision,
        engine: Engine,
        *,
        system: str | None = None,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
        reference_pixels: bool = False,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """See Runtime.session."""
        self._spec, self._tokenizer, self._store = spec, tokenizer, store
        self._vision, self._engine = vision, engine
        self.system = system
        self.max_slice_nums = spec.slices.max_slice_nums if max_slice_nums is None else max_slice_nums
        self.use_image_id = spec.use_image_id if use_image_id is None else use_image_id
        self.reference_pixels = reference_pixels
        self._plan((1, 1), self.max_slice_nums)  # refuses an impossible one now
        self.sampling = dict(sampling or {})
        self._sampling()  # refuses impossible values now
        self.notes: tuple[str, ...] = ()
        self.unsaved: str | None = None
        self._journal: Journal | None = None
        self._keeper: Keeper | None = None
        self._turns: list[Turn] = []
        self._n_images = 0
        self._running = False

    @property
    def turns(self) -> list[Turn]:
        """The turns so far, oldest first."""
        return list(self._turns)

    @property
    def images(self) -> list[ImageHandle]:
        """The pictures of all turns, oldest first."""
        return [part for turn in self._turns for part in turn.parts if isinstance(part, ImageHandle)]

    def ask(
        self,
        text: str | Sequence[str | ImageSource],
        images: ImageSource | Sequence[ImageSource] = (),
        **sampling: Any,
    ) -> Reply:
        """A question, with pictures before it.  Iterating over the Reply, or reading its text, runs it.

        text: the question; or a list of texts and pictures, where pictures stand within the text (in the list a str
            is text: name a file there by a pathlib.Path).
        images: one or a list: paths, file contents, PIL images or arrays (see mmchat.images.open_image).
        sampling: fields of mmchat.engine.Sampling; the model's own values are the defaults.

        Raises at once: ImageError, SessionError (no question), PromptError (sampling).  Raises when run: ContextFull,
        SessionError (another reply is running), EngineError, StoreError.  A turn that fails leaves no trace.
        """
        parts: list[Any] = [text] if isinstance(text, str) else list(text)
        if not any(isinstance(part, str) and part.strip() for part in parts):
            raise SessionError("the question is empty: ask something")
        pictures: Any = images if isinstance(images, (list, tuple)) else [images]
        prepared: list[str | _Prepared] = [self._prepare(picture) for picture in pictures]
        prepared += [part if isinstance(part, str) else self._prepare(part) for part in parts]
        return Reply(self, tuple(prepared), self._sampling(sampling))

    def _sampling(self, given: Mapping[str, Any] | None = None) -> Sampling:
        return Sampling.from_dict({**self._spec.sampling.to_dict(), **self.sampling, **(given or {})})

    def undo(self, n: int = 1) -> list[Turn]:
        """Take back the last n turns and their pictures; returns them, oldest first."""
        if self._running:
            raise SessionError("an answer is being streamed: finish or close it before undoing")
        if not 1 <= n <= len(self._turns):
            raise SessionError(f"cannot take back {n} turn(s): the conversation has {len(self._turns)}")
        taken = self._turns[-n:]
        del self._turns[-n:]
        self._n_images = len(self.images)
        self._autosave()
        return taken

    def save(self, path: str | Path, *, images: str = "original", embeddings: bool = False) -> None:
        """Write the conversation to a file, whole or not at all; Runtime.load opens it, here or elsewhere.

        images: "original" keeps the pictures' files; "reencoded" their pixels without loss and without metadata;
            "jpeg" JPEGs, which are smaller and other pixels; "none" none: then they can be asked about for as long as
            a store has their embeddings.  A picture that came without a file is kept without loss.
        embeddings: keep them too, so that nothing need be encoded again where the same model runs.

        Raises BundleError: it cannot be written, or another conversation is being saved there.
        """
        keeper = Keeper(self._spec, self._store, images, embeddings)
        record = self._saved(keeper)
        if self._journal is not None and os.path.realpath(self._journal.path) == os.path.realpath(path):
            self._journal.rewrite(record, keeper.picture, keeper.rows)
            self._keeper, self.unsaved = keeper, None
        else:
            Journal.create(path, record, keeper.picture, keeper.rows).close()

    def autosave(self, path: str | Path | None, *, images: str = "original", embeddings: bool = False) -> None:
        """Keep a file up to date from now on: after every turn what is new is added to it.  None ends it.

        A turn whose saving fails (disk full) is there all the same; `unsaved` and the log say why, and it is saved
        with the next one.

        Raises BundleError: the file is there already (Runtime.load goes on with it), or cannot be written.
        """
        journal = keeper = None
        if path is not None:
            keeper = Keeper(self._spec, self._store, images, embeddings)
            journal = Journal.create(path, self._saved(keeper), keeper.picture, keeper.rows, overwrite=False)
        if self._journal is not None:
            self._journal.close()
        self._journal, self._keeper, self.unsaved = journal, keeper, None

    def restore(self, bundle: Bundle, *, autosave: bool = False) -> None:
        """Become the conversation of a bundle.  See Runtime.load."""
        if self._turns or self._running:
            raise SessionError("this conversation has begun already: load into a new one")
        restored = Restored(bundle, self._spec, self._tokenizer, self._store, self._plan)
        self._turns, self.notes = restored.turns, tuple(restored.notes)
        self._n_images = len(self.images)
        if autosave:
            self._resume(bundle, restored)

    def _resume(self, bundle: Bundle, restored: Restored) -> None:
        """Go on in the bundle's file, or in a new one in its place where it is damaged or mostly waste."""
        self._keeper = Keeper(self._spec, self._store, "original", bool(bundle.keys), restored.known)
        record = self._saved(self._keeper)
        if bundle.damaged:
            self.notes += (f"the damaged file is kept as {set_aside(bundle.path).name}",)
        if bundle.damaged or bundle.is_mostly_waste:
            self._journal = Journal.replace(bundle, record, self._keeper.picture, self._keeper.rows)
        else:
            self._journal = Journal.resume(bundle)
            self._journal.write(record, self._keeper.picture, self._keeper.rows)

    def saved(self) -> SavedRecord:
        """The conversation as values, pictures by name only."""
        return self._saved(Keeper(self._spec, self._store, "none", False))

    def _saved(self, keeper: Keeper) -> SavedRecord:
        settings = SavedSettings(
            self.system, self.max_slice_nums, self.use_image_id, self.reference_pixels, sampling=self.sampling
        )
        model = saved_model(self._spec, self._tokenizer, pictures=bool(self.images))
        return SavedRecord(settings, model, keeper.turns(self._turns))

    def _autosave(self) -> None:
        if self._journal is None or self._keeper is None:
            return
        try:
            self._journal.write(self._saved(self._keeper), self._keeper.picture, self._keeper.rows)
            self.unsaved = None
        except MmchatError as error:
            self.unsaved = str(error)  # the error itself would keep this session, and its file, from going
            _LOG.warning("not saved: %s", self.unsaved)

    def prompt(self, parts: Sequence[str | ImageHandle] = ()) -> Prompt:
        """The conversation as it would be sent, with a further question where parts are given."""
        messages = [Message("system", (Text(self.system),))] if self.system else []
        for turn in self._turns:
            messages.append(Message("user", _prompt_parts(turn.parts)))
            messages.append(Message("assistant", ids=turn.ids))
        if parts:
            messages.append(Message("user", _prompt_parts(parts)))
        return render(messages, self._tokenizer, query_num=self._spec.vision.query_num, use_image_id=self.use_image_id)

    def _plan(self, size: Size, max_slice_nums: int) -> SlicePlan:
        rule = self._spec.slices
        return plan_slices(
            *size,
            max_slice_nums=max_slice_nums,
            scale_resolution=rule.scale_resolution,
            patch_size=rule.patch_size,
            max_patches=rule.max_patches,
        )

    def _prepare(self, source: ImageSource) -> _Prepared:
        path = name = ""
        file = source if isinstance(source, bytes) else None
        if isinstance(source, (str, os.PathLike)):
            path = os.fspath(source)
            name = Path(source).name.encode(errors="backslashreplace").decode()  # a name need not be Unicode
            with open_image(source):  # a clear error, before all of a file is read that is no picture
                pass
            file = Path(source).read_bytes()
        reference, max_slice_nums = self.reference_pixels, self.max_slice_nums
        with open_image(source if file is None else file, reference=reference, name=path) as opened:
            plan = self._plan(opened.size, max_slice_nums)
            image = opened.read(at_least=plan.refined or plan.source)
            slices = slice_image(image, plan)
            # The file as it is now, or the pixels: file, image or array may be changed later.
            read, digest = keep(image) if file is None else ((lambda: file), None)
        keys = tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in slices)
        original = Original(read, keys, max_slice_nums=max_slice_nums, reference=reference, digest=digest)
        return _Prepared(name, plan, keys, slices, original)

    def _handle(self, prepared: _Prepared, number: int) -> ImageHandle:
        return ImageHandle(
            f"img{number}",
            prepared.plan.size,
            prepared.plan.n_inputs,
            prepared.plan.n_inputs * self._spec.vision.query_num,
            len(self._turns) + 1,
            prepared.name,
            plan=prepared.plan,
            keys=prepared.keys,
            original=prepared.original,
        )

    def check_idle(self) -> None:
        """Raises SessionError while an answer is being streamed."""
        if self._running:
            raise SessionError("another answer of this conversation is being streamed: finish or close it first")

    def _run(self, reply: Reply, prepared: Sequence[str | _Prepared]) -> Iterator[str]:
        """One turn: encode what the store lacks, generate, record.  Yields the answer's text."""
        self.check_idle()
        self._running = True
        started = time.perf_counter()
        parts: list[str | ImageHandle] = []
        shown: list[int] = []
        done: Done | None = None
        failed = False
        try:
            for part in prepared:
                n = self._n_images + 1 + len(_images(parts))
                parts.append(part if isinstance(part, str) else self._handle(part, n))
            prompt = self.prompt(parts)
            check_fits(prompt.n_rows, reply.sampling.max_new_tokens, self._engine.context_rows)
            with self._store.lease({key for image in [*self.images, *_images(parts)] for key in image.keys}):
                self._encode(reply, prepared)
                events = self._generate(reply, prompt, parts, shown)
                try:
                    for event in events:
                        if isinstance(event, Done):
                            done = event
                        if event.text:
                            reply.text_so_far += event.text
                            yield event.text
                except GeneratorExit:  # the reader left: the engine still tells what it did
                    reply.cancel()
                    with contextlib.suppress(MmchatError):
                        done = next((event for event in events if isinstance(event, Done)), done)
                    done = done and replace(done, reason="cancelled", ids=self._spelled(done.ids, reply.text_so_far))
                    raise
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException:
            failed = True
            raise
        finally:
            self._running = False
            reply.finish(started, done)
            if not failed and (reply.text_so_far or (done is not None and done.reason != "cancelled")):
                ids = self._spelled(shown, reply.text_so_far) if done is None else done.ids
                self._turns.append(Turn(tuple(parts), reply.text_so_far, ids, reply.reason_so_far, reply.usage_so_far))
                self._n_images = len(self.images)
                self._autosave()

    def _spelled(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """The tokens of exactly the text that was shown: more may have been generated, or held back."""
        return tuple(ids_of_text(ids, text, self._tokenizer.token_bytes, self._tokenizer.encode))

    def _encode(self, reply: Reply, prepared: Sequence[str | _Prepared]) -> None:
        wanted = [part for part in prepared if not isinstance(part, str)]
        slices = [pair for part in wanted for pair in zip(part.keys, part.slices, strict=True)]
        missing = {key: pixels for key, pixels in slices if not self._store.has(key)}
        reply.count(slices_cached=len(slices) - len(missing))
        self._encode_slices(reply, missing)

    def _encode_slices(self, reply: Reply, missing: dict[str, NDArray[np.uint8]]) -> None:
        if not missing:
            return
        done = self._vision.encode(list(missing.items()), reply.on_progress("encode"), reply.should_stop)
        reply.count(slices_encoded=done.n_slices, restarts=done.restarts, encode_s=done.seconds)

    def _generate(
        self, reply: Reply, prompt: Prompt, parts: Sequence[str | ImageHandle], shown: list[int]
    ) -> Iterator[Token | Done]:
        """The engine's tokens; embeddings that vanished from the store meanwhile are made again, once."""
        for attempt in (1, 2):
            if reply.should_stop():
                return
            try:
                for event in self._engine.generate(prompt.pieces, reply.sampling, reply.should_stop, resume_ids=shown):
                    if isinstance(event, Prefill):
                        reply.on_progress("prefill")(event.done, event.total)
                    elif isinstance(event, Restarted):
                        reply.count(restarts=1)
                    else:
                        if isinstance(event, Token):
                            shown.append(event.id)
                        yield event
                return
            except MissingEmbeddings as error:
                if attempt == 2:
                    raise
                lost = set(error.keys)
            for image in [*self.images, *_images(parts)]:
                for key in lost.intersection(image.keys):
                    rows = image.original.embedding(key)
                    if rows is not None:
                        self._store.put(key, rows)
                        lost.discard(key)
            again: dict[str, NDArray[np.uint8]] = {}
            for image in [*self.images, *_images(parts)]:
                if lost.intersection(image.keys) - set(again):
                    again.update(zip(image.keys, self._cut_again(image), strict=True))
            self._encode_slices(reply, {key: pixels for key, pixels in again.items() if key in lost})

    def _cut_again(self, image: ImageHandle) -> list[NDArray[np.uint8]]:
        """Raises ImageError, BundleError: the picture is gone, or another than the one that the keys are of."""
        try:
            slices = image.pixels()
        except ImageError as error:
            raise ImageError(f"{image.id} cannot be cut again: {error}") from None
        if tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in slices) != image.keys:
            raise ImageError(f"{image.id} ({image.name or 'a picture'}): its saved picture is not the one it was")
        return slices


@dataclass(frozen=True)
class _Prepared:
    """A picture that was read and cut, not yet part of the conversation."""

    name: str
    plan: SlicePlan
    keys: tuple[str, ...]
    slices: list[NDArray[np.uint8]]
    original: Original


class Reply:
    """An answer on its way.  Iterating yields text as it comes; it runs once, whatever is read how often.

    on_wait, where set before it runs: called with ("encode" | "prefill", done, total).
    """

    def __init__(self, session: Session, prepared: tuple[str | _Prepared, ...], sampling: Sampling) -> None:
        if sampling.seed is None:  # drawn here, so that a crashed worker's successor goes on with the same one
            sampling = replace(sampling, seed=time.time_ns() & 0x7FFF_FFFF)
        self.sampling = sampling
        self.on_wait: Callable[[str, int, int], None] = lambda stage, done, total: None
        self.text_so_far = ""
        self.usage_so_far = Usage()
        self.reason_so_far: StopReason = "cancelled"
        self._session = session
        self._prepared: tuple[str | _Prepared, ...] | None = prepared  # None: it has run
        self._chunks: list[str] = []
        self._error: BaseException | None = None
        self._stop = False

    def __iter__(self) -> Iterator[str]:
        """Leaving the loop early (break, close, Ctrl-C) ends the answer and records what was shown."""
        yield from list(self._chunks)
        if self._prepared is None:
            if self._error is not None:
                raise self._error
            return
        self._session.check_idle()
        prepared, self._prepared = self._prepared, None
        try:
            for text in self._session._run(self, prepared):
                self._chunks.append(text)
                yield text
        except EngineBusy:
            self._prepared = prepared  # nothing has happened yet: it may be tried again
            raise
        except Exception as error:
            self._error = error
            raise

    @property
    def text(self) -> str:
        """The whole answer; waits for its end."""
        self._finish()
        return self.text_so_far

    @property
    def stop_reason(self) -> StopReason:
        """ "stop" (the model was done, or a stop text), "length" (max_new_tokens), "cancelled"; waits for the end."""
        self._finish()
        return self.reason_so_far

    @property
    def usage(self) -> Usage:
        """Counts and times; waits for the end."""
        self._finish()
        return self.usage_so_far

    def cancel(self) -> None:
        """End the answer soon; from any thread.  What was shown is kept."""
        self._stop = True

    def should_stop(self) -> bool:
        return self._stop

    def on_progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_wait(stage, done, total)

    def count(self, **amounts: float) -> None:
        """Add to the usage."""
        sums = {name: getattr(self.usage_so_far, name) + amount for name, amount in amounts.items()}
        self.usage_so_far = replace(self.usage_so_far, **sums)

    def finish(self, started: float, done: Done | None) -> None:
        """Called once by the session, when the answer has ended in whatever way."""
        if done is not None:
            self.reason_so_far = done.reason
            self.count(**{name: getattr(done, name) for name in _FROM_DONE})
        self.count(total_s=time.perf_counter() - started)

    def _finish(self) -> None:
        for _ in self:
            pass


_FROM_DONE = ("n_prompt", "n_reused", "n_prefilled", "n_new", "prefill_s", "generate_s")


def _images(parts: Sequence[str | ImageHandle]) -> list[ImageHandle]:
    return [part for part in parts if isinstance(part, ImageHandle)]


def _prompt_parts(parts: Sequence[str | ImageHandle]) -> tuple[Text | Picture, ...]:
    return tuple(Text(part) if isinstance(part, str) else Picture(part.plan, part.keys) for part in parts)
