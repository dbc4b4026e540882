"""A conversation: the record of its turns, and how one more comes about.

    state       call                        becomes
    idle        ask, edit, regenerate       idle (a Reply that has not run)
    idle        iterate the reply           running
    running     the answer ends             idle, the turn recorded
    running     cancel, close, Ctrl-C       idle, recorded as far as it was shown ("cancelled"); nothing shown, no turn
    running     error                       idle, nothing recorded
    running     iterate another reply,      SessionError
                undo, pin, forget, ...

The record is the truth; what the engine's KV cache holds is its own business.  Every turn sends the whole
conversation as pieces, as far as it fits (mmchat.context); so taking turns back, asking one again and branching are
nothing but other pieces, and cost what differs.  What a turn had to degrade is remembered when it is recorded, and only
then.  This module knows no template, no pixels and no processes: it is handed an Engine and a Vision.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmchat.bundle import Bundle, Journal, SavedRecord, SavedSettings, set_aside
from mmchat.context import Change, Conversation, Policy
from mmchat.decoding import ids_of_text
from mmchat.engine import Done, Engine, ImageRows, Prefill, Restarted, Sampling, StopReason, Token, Vision
from mmchat.errors import BundleError, ContextFull, EngineBusy, ImageError, MissingEmbeddings, MmchatError, SessionError
from mmchat.forecast import Outlook, Plan, measured_before, plan_prompt
from mmchat.images import open_image
from mmchat.model_dir import ModelSpec
from mmchat.prompt import DEFAULT_SYSTEM_PROMPT, ChatTokenizer, Message, Prompt, RowCounter, Text, render
from mmchat.record import ImageHandle, Marks, Original, Turn, Usage, images_in
from mmchat.saving import Keeper, cut_again, keep, saved_model, saved_state
from mmchat.sections import same_place
from mmchat.slicing import SlicePlan, slice_image
from mmchat.store import Store, slice_key

if TYPE_CHECKING:
    from mmchat.images import ImageSource

_LOG = logging.getLogger("mmchat")
_Value = TypeVar("_Value")


class Session:
    """A conversation.  Made by Runtime.session and Runtime.load; for one thread at a time.

    notes: what was lost or had to be made again when it was loaded, in words.
    unsaved: why the last change is not in the file that autosave names; None where it is, or there is none.
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
        policy: Policy | str | Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
        turns: Sequence[Turn] = (),
        marks: Marks | None = None,
        notes: Sequence[str] = (),
        n_foreign: int | None = None,
        outlook: Outlook | None = None,
        came_as: tuple[str, Mapping[Original, str]] = ("original", {}),
    ) -> None:
        """See Runtime.session.

        turns, marks, notes: a record to go on from.  n_foreign: how many of these turns, the first ones, another
        engine or model has answered, so that they do not say how fast this one is; None: all.
        outlook: what is known of the engine, shared by all its sessions.
        came_as: the form in which the bundle that it was restored from has pictures, and their ids there: in that
            form they are kept as they are.
        """
        self._spec, self._tokenizer, self._store = spec, tokenizer, store
        self._vision, self._engine, self._outlook = vision, engine, outlook or Outlook()
        self.system = system
        most = spec.slices.max_slice_nums if max_slice_nums is None else max_slice_nums
        spec.slices.plan((1, 1), most)  # refuses an impossible one now
        self._max_slice_nums = int(most)
        self._use_image_id = bool(spec.use_image_id if use_image_id is None else use_image_id)
        self._reference_pixels = bool(reference_pixels)
        self._policy = Policy.of(policy)
        self.sampling = dict(sampling or {})
        self.notes = tuple(notes)
        self.unsaved: str | None = None
        self._sampling({})  # refuses impossible values now
        self._counter = RowCounter(tokenizer, query_num=spec.vision.query_num, use_image_id=self.use_image_id)
        self._turns: tuple[Turn, ...] = tuple(turns)
        self._marks = (marks or Marks()).of(self._turns)
        self._n_foreign = len(self._turns) if n_foreign is None else n_foreign
        self._speeds_before = measured_before(turn.usage for turn in self._turns[self._n_foreign :])
        self._running = threading.Lock()
        self._journal: Journal | None = None
        self._keeper: Keeper | None = None
        self._came_as = came_as

    @property
    def max_slice_nums(self) -> int:
        """The most cells that a new picture is cut into."""
        return self._max_slice_nums

    @property
    def use_image_id(self) -> bool:
        """Whether pictures are sent with their numbers."""
        return self._use_image_id

    @property
    def reference_pixels(self) -> bool:
        """Whether new pictures are read by the published processor's rules."""
        return self._reference_pixels

    @property
    def policy(self) -> Policy:
        """What goes first when the context is full; may be set, to anything that Policy.of takes."""
        return self._policy

    @policy.setter
    def policy(self, value: Policy | str | Sequence[str] | None) -> None:
        self._policy = Policy.of(value)

    @property
    def turns(self) -> list[Turn]:
        """The turns so far, oldest first; whether they are still sent or not."""
        return list(self._turns)

    @property
    def images(self) -> list[ImageHandle]:
        """The pictures of all turns, oldest first."""
        return _images_of(self._turns)

    @property
    def marks(self) -> Marks:
        """What of the turns is sent otherwise than it was said."""
        return self._marks

    @property
    def numbers(self) -> dict[str, int]:
        """By id, the number (from 1) of each picture that is sent to be seen: what "image 2" means to the model."""
        return Conversation(self._system, self._turns).numbers(self._marks)

    # Asking

    def ask(
        self,
        text: str | Sequence[str | ImageSource | ImageHandle],
        images: ImageSource | ImageHandle | Sequence[ImageSource | ImageHandle] = (),
        **sampling: Any,
    ) -> Reply:
        """A question, with pictures before it.  Iterating over the Reply, or reading its text, runs it.

        text: the question; or a list of texts and pictures, where pictures stand within the text (in the list a str
            is text: name a file there by a pathlib.Path).  @img2 in a text stands for that picture of the
            conversation.
        images: one or a list: paths, file contents, PIL images or arrays (see mmchat.images.open_image), or pictures
            of this conversation, which are then sent once more, under a new id.
        sampling: fields of mmchat.engine.Sampling; the model's own values are the defaults.

        Raises at once: ImageError, SessionError (no question), PromptError (sampling).  Raises when run: ContextFull,
        SessionError (another reply is running), EngineError, StoreError.  A turn that fails leaves no trace.
        """
        return Reply(self, self._prepare_all(text, images), self._sampling(sampling))

    def plan(
        self,
        text: str | Sequence[str | ImageSource | ImageHandle],
        images: ImageSource | ImageHandle | Sequence[ImageSource | ImageHandle] = (),
        **sampling: Any,
    ) -> Plan:
        """What ask() with the same arguments would send and cost, now.  Nothing is encoded, computed or written.

        Raises what asking raises, ContextFull included.
        """
        question = self._question(self._prepare_all(text, images), self._turns)
        return self._plan(self._turns, self._marks, question, self._sampling(sampling))[0]

    def edit(
        self,
        turn: int,
        text: str | Sequence[str | ImageSource | ImageHandle],
        images: ImageSource | ImageHandle | Sequence[ImageSource | ImageHandle] | None = None,
        **sampling: Any,
    ) -> Reply:
        """Another question in the place of a turn's (numbered from 1), and the conversation goes on from there.

        images: None keeps the turn's pictures, before the question; but where text is a list, it names them all.  The
        turn and those after it are replaced when the answer is recorded, and stay where there is none (an error;
        cancelled before anything was shown).

        Raises what ask() raises, and SessionError where there is no such turn.
        """
        old = self._turn(turn)
        if images is None:
            images = old.images if isinstance(text, str) else ()
        return Reply(self, self._prepare_all(text, images), self._sampling(sampling), base=turn - 1)

    def regenerate(self, **sampling: Any) -> Reply:
        """The last question once more; its answer replaces the one before, as in edit().

        Greedy answers do not change: give a temperature, or another seed.

        Raises SessionError where there is no turn yet; when run, where there is a later one by then.
        """
        last = self._turn(len(self._turns) or 1)
        base = len(self._turns) - 1
        return Reply(self, self._prepare_all(list(last.parts), ()), self._sampling(sampling), base=base, is_newest=True)

    # The record

    def undo(self, n: int = 1) -> list[Turn]:
        """Take back the last n turns and their pictures; returns them, oldest first."""
        with self.claim("undoing"):
            if not 1 <= n <= len(self._turns):
                raise SessionError(f"cannot take back {n} turn(s): the conversation has {len(self._turns)}")
            taken = self._turns[-n:]
            self._turns = self._turns[:-n]
            self._n_foreign = min(self._n_foreign, len(self._turns))
            self._marks = self._marks.of(self._turns)
            return list(taken)

    def branch(self, at: int | None = None) -> Session:
        """Another conversation that has the first `at` turns of this one (None: all), and its settings.

        What the two have in common is found in the engine's cache by whichever asks next.  Where this one is autosaved,
        the other is not.
        """
        at = len(self._turns) if at is None else at
        if not 0 <= at <= len(self._turns):
            raise SessionError(f"cannot branch after turn {at}: the conversation has {len(self._turns)}")
        turns = self._turns[:at]
        return Session(
            self._spec,
            self._tokenizer,
            self._store,
            self._vision,
            self._engine,
            system=self.system,
            max_slice_nums=self.max_slice_nums,
            use_image_id=self.use_image_id,
            reference_pixels=self.reference_pixels,
            policy=self.policy,
            sampling=self.sampling,
            turns=turns,
            marks=self._marks.of(turns),
            n_foreign=min(self._n_foreign, at),
            outlook=self._outlook,
            came_as=self._came_as,
        )

    def pin(self, what: str | ImageHandle | int) -> None:
        """Keep a picture ("img2" or its handle), or a turn (its number), as it is now when the conversation is trimmed.

        A pinned picture keeps its turn; a pinned turn, its pictures.  Raises SessionError: there is no such thing.
        """
        self._pin(what, True)

    def unpin(self, what: str | ImageHandle | int) -> None:
        """Let it go again when the conversation is trimmed.  Raises SessionError: there is no such thing."""
        self._pin(what, False)

    def forget(self, image: str | ImageHandle) -> None:
        """Send a picture as a line of text from now on, until reattach.  A pin ends.  Raises SessionError."""
        with self.claim("forgetting a picture"):
            name = self._image(image).id
            marks = self._marks
            self._marks = replace(
                marks,
                forms={**marks.forms, name: "line"},
                pinned=marks.pinned - {name},
                returned=_without(marks.returned, name),
            )

    def reattach(self, image: str | ImageHandle) -> None:
        """Send a picture whole again, where it was, whatever became of it; its turn too.

        The next question costs the rows from there on.  The picture then counts as new, so that it is not the first to
        go again.  (To show it once more after all that was said, ask with images=[its handle]: that costs its own rows
        alone.)  Raises SessionError.
        """
        with self.claim("reattaching a picture"):
            handle, marks = self._image(image), self._marks
            if marks.form(handle) == "whole" and handle.turn not in marks.dropped:
                return
            self._marks = replace(
                marks,
                forms=_without(marks.forms, handle.id),
                dropped=marks.dropped - {handle.turn},
                returned={**marks.returned, handle.id: len(self._turns) + 1},
            )

    def prompt(self, parts: Sequence[str | ImageHandle] = ()) -> Prompt:
        """The conversation as it is sent by now, with a further question where parts are given; it need not fit."""
        return self._render(Conversation(self._system, self._turns, parts), self._marks)

    # Files

    def save(self, path: str | Path, *, images: str | None = None, embeddings: bool | None = None) -> None:
        """Write the conversation to a file, whole or not at all; Runtime.load opens it, here or elsewhere.

        images: "original" keeps the pictures' files; "reencoded" the pixels that were used (of a JPEG much larger than
            its views, fewer than it has) without loss and without metadata; "jpeg" JPEGs, which are smaller and other
            pixels; "none" none: then they can be asked about for as long as a store has their embeddings.  A picture
            that came without a file is kept without loss.
        embeddings: keep them too, so that nothing need be encoded again where the same model runs.

        None: as the file that autosave keeps up to date has it, where that is written anew; else "original", without
            embeddings.

        Raises BundleError: it cannot be written, or another conversation is being saved there.
        """
        is_own = self.saved_to is not None and same_place(self.saved_to, path)
        form, with_rows = (self.saved_form, self.saves_embeddings) if is_own else ("original", False)
        form = form if images is None else images
        keeper = self._keeper_of(form, (with_rows and form != "jpeg") if embeddings is None else embeddings)
        record = self._saved(keeper)
        if is_own:
            with self.claim("saving"):
                assert self._journal is not None
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
        with self.claim("saving"):
            journal = keeper = None
            if path is not None:
                keeper = self._keeper_of(images, embeddings)
                journal = Journal.create(path, self._saved(keeper), keeper.picture, keeper.rows, overwrite=False)
            if self._journal is not None:
                self._journal.close()
            self._journal, self._keeper, self.unsaved = journal, keeper, None

    @property
    def saved_to(self) -> Path | None:
        """The file that is kept up to date."""
        return self._journal.path if self._journal else None

    @property
    def saved_form(self) -> str:
        """How pictures are kept there; else in the file that this conversation came from; else as they came."""
        return self._keeper.form if self._keeper else self._came_as[0]

    @property
    def saves_embeddings(self) -> bool:
        """Whether their embeddings are kept there, too."""
        return self._keeper is not None and self._keeper.embeddings

    def resume(self, bundle: Bundle, *, has_less: bool = False) -> None:
        """Autosave to the bundle that this conversation was restored from; see Runtime.load.

        has_less: what is restored lacks something that is of use to another model.
        """
        settings = bundle.record.settings
        keeper = self._keeper_of(settings.pictures, settings.embeddings)
        record = self._saved(keeper)
        journal = None
        if bundle.damaged or has_less:
            ending, kind = ("damaged", "damaged file") if bundle.damaged else ("before", "file as it was")
            with set_aside(bundle.path, ending) as aside:
                journal = Journal.replace(bundle, record, keeper.picture, keeper.rows)
            self.notes += (f"the {kind} is kept as {aside.name}",)
        elif bundle.is_mostly_waste:
            with contextlib.suppress(BundleError):  # a full disk: it goes on as it is
                journal = Journal.replace(bundle, record, keeper.picture, keeper.rows)
        if journal is None:
            journal = Journal.resume(bundle)
            journal.write(record, keeper.picture, keeper.rows)
        self._journal, self._keeper = journal, keeper

    def _keeper_of(self, images: str, embeddings: bool) -> Keeper:
        form, known = self._came_as
        return Keeper(self._spec, self._store, images, embeddings, known if images == form else None)

    def saved(self) -> SavedRecord:
        """The conversation as values, without pictures."""
        return self._saved(Keeper(self._spec, self._store, "none", False))

    def _saved(self, keeper: Keeper) -> SavedRecord:
        turns, marks = self._turns, self._marks
        model = saved_model(self._spec, self._tokenizer, pictures=bool(_images_of(turns)))
        chosen = self._sampling({}).to_dict()
        sampling = {name: chosen[name] for name in self.sampling}
        settings = SavedSettings(
            self.system,
            self.max_slice_nums,
            self.use_image_id,
            self.reference_pixels,
            asdict(self.policy),
            sampling,
            keeper.form,
            keeper.embeddings,
        )
        state = {**saved_state(marks), **self._outlook.note(self._n_foreign)}
        return SavedRecord(settings, model, keeper.turns(turns), state)

    def _autosave(self) -> None:
        if self._journal is None or self._keeper is None:
            return
        try:
            self._journal.write(self._saved(self._keeper), self._keeper.picture, self._keeper.rows)
            self.unsaved = None
        except MmchatError as error:
            self.unsaved = str(error)  # the error itself would keep this session, and its file, from going
            _LOG.warning("not saved: %s", self.unsaved)
        except BaseException as error:  # Ctrl-C
            self.unsaved = f"{self._journal.path}: saving was interrupted ({type(error).__name__})"
            raise

    def check_idle(self, doing: str = "") -> None:
        """Raises SessionError while an answer is being streamed."""
        if self._running.locked():
            raise SessionError(
                f"an answer is being streamed: finish or close it before {doing}"
                if doing
                else "another answer of this conversation is being streamed: finish or close it first"
            )

    @contextlib.contextmanager
    def claim(self, doing: str = "") -> Iterator[None]:
        """Nobody else runs or changes the conversation meanwhile; what it has become is then saved, where it is to be.

        Raises SessionError.
        """
        if not self._running.acquire(blocking=False):
            self.check_idle(doing)
            raise SessionError("another thread is changing this conversation")
        try:
            try:
                yield
            finally:
                self._autosave()
        finally:
            self._running.release()

    def _pin(self, what: str | ImageHandle | int, is_pinned: bool) -> None:
        with self.claim("pinning"):
            marks = self._marks
            if isinstance(what, int):
                self._turn(what)
                turns = marks.pinned_turns | {what} if is_pinned else marks.pinned_turns - {what}
                self._marks = replace(marks, pinned_turns=turns)
            else:
                name = self._image(what).id
                self._marks = replace(marks, pinned=marks.pinned | {name} if is_pinned else marks.pinned - {name})

    def _turn(self, number: int) -> Turn:
        if not self._turns:
            raise SessionError("there is no turn yet: ask something first")
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(self._turns):
            raise SessionError(f"there is no turn {number!r}: they are 1 to {len(self._turns)}")
        return self._turns[number - 1]

    def _image(self, what: str | ImageHandle) -> ImageHandle:
        name = what.id if isinstance(what, ImageHandle) else str(what).removeprefix("@")
        for image in self.images:
            if image.id == name:
                return image
        images = self.images
        known = f"they are {images[0].id} to {images[-1].id}" if images else "there is none yet"
        raise SessionError(f"there is no picture {name!r}: {known}")

    # Preparing

    def _prepare_all(self, text: Any, images: Any) -> tuple[str | _Prepared, ...]:
        parts: list[Any] = [text] if isinstance(text, str) else list(text)
        if not any(isinstance(part, str) and part.strip() for part in parts):
            raise SessionError("the question is empty: ask something")
        pictures: Any = images if isinstance(images, (list, tuple)) else [images]
        prepared: list[str | _Prepared] = [self._prepare(picture) for picture in pictures]
        prepared += [part if isinstance(part, str) else self._prepare(part) for part in parts]
        return tuple(prepared)

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        return Sampling.from_dict({**self._spec.sampling.to_dict(), **self.sampling, **given})

    def _prepare(self, source: ImageSource | ImageHandle) -> _Prepared:
        if isinstance(source, ImageHandle):
            if source.keys not in [image.keys for image in self.images]:
                raise SessionError(f"{source.id} is not in this conversation, or not any more: give its file")
            pixels = source.pixels
            return _Prepared(source.name, source.plan, source.keys, pixels, pixels, source.original, handle=source)
        path = name = ""
        file = source if isinstance(source, bytes) else None
        if isinstance(source, (str, os.PathLike)):
            path = os.fspath(source)
            name = Path(source).name.encode(errors="backslashreplace").decode()  # a name need not be Unicode
            with open_image(source):  # a clear error, before all of a file is read that is no picture
                pass
            file = Path(source).read_bytes()
        rules: dict[str, Any] = {"max_slice_nums": self.max_slice_nums, "reference": self.reference_pixels}
        with open_image(source if file is None else file, reference=self.reference_pixels, name=path) as opened:
            plan = self._spec.slices.plan(opened.size, self.max_slice_nums)
            image = opened.read(at_least=plan.refined or plan.source)
            slices = slice_image(image, plan)
            # The file as it is now, or the pixels: file, image or array may be changed later.
            read, digest = keep(image) if file is None else ((lambda: file), None)
        if plan.shrunk:
            limit = self._spec.slices.max_patches
            _LOG.warning("%s: too long for the encoder's %d patches, so views are shrunk", name or "a picture", limit)
        keys = tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in slices)
        original = Original(read, keys, **rules, digest=digest)
        return _Prepared(name, plan, keys, lambda: slices, lambda: cut_again(original, plan), original)

    def _question(self, prepared: Sequence[str | _Prepared], turns: Sequence[Turn]) -> tuple[str | ImageHandle, ...]:
        """The parts of a question after these turns."""
        n_images = max((int(image.id.removeprefix("img")) for image in _images_of(turns)), default=0)
        parts: list[str | ImageHandle] = []
        for part in prepared:
            if isinstance(part, str):
                parts.append(part)
                continue
            n_images += 1
            parts.append(
                ImageHandle(
                    f"img{n_images}",
                    part.plan.size,
                    part.plan.n_inputs,
                    part.plan.n_inputs * self._spec.vision.query_num,
                    len(turns) + 1,
                    part.name,
                    plan=part.plan,
                    keys=part.keys,
                    pixels=part.again,
                    original=part.original,
                )
            )
        return tuple(parts)

    @property
    def _system(self) -> Message:
        return Message("system", (Text(self.system or DEFAULT_SYSTEM_PROMPT),))

    def _render(self, conversation: Conversation, marks: Marks) -> Prompt:
        return render(
            conversation.messages(marks),
            self._tokenizer,
            query_num=self._spec.vision.query_num,
            use_image_id=self.use_image_id,
        )

    def _plan(
        self,
        turns: Sequence[Turn],
        marks: Marks,
        question: Sequence[str | ImageHandle],
        sampling: Sampling,
        longest: int | None = None,
    ) -> tuple[Plan, Prompt]:
        """longest: see plan_prompt.  Raises ContextFull."""
        conversation = Conversation(self._system, turns, question)
        return plan_prompt(
            conversation,
            marks,
            self._counter,
            lambda marks: self._render(conversation, marks),
            self._outlook,
            cap=self._engine.context_rows,
            max_new_tokens=sampling.max_new_tokens,
            policy=self.policy,
            slices_new=lambda prompt, reused: self._n_to_encode(turns, question, prompt, reused),
            before=self._speeds_before,
            longest=longest,
        )

    def _n_to_encode(
        self, turns: Sequence[Turn], question: Sequence[str | ImageHandle], prompt: Prompt, reused: int
    ) -> int:
        """Slices of the question's pictures, and of those whose rows the engine computes again, that are nowhere."""
        sent = [piece.key for piece in prompt.pieces if isinstance(piece, ImageRows)]
        own, again, end = {key for image in images_in(question) for key in image.keys}.intersection(sent), set(), 0
        for piece in prompt.pieces:
            end += piece.n_rows
            if end > reused and isinstance(piece, ImageRows):
                again.add(piece.key)
        missing = {key for key in own | again if not self._store.peek(key)}
        for image in _images_of(turns):
            missing -= _came_along(image, missing - own)
        for image in images_in(question):  # which may be one of the turns' again
            missing -= _came_along(image, missing)
        return len(missing)

    # Running

    def run(
        self, reply: Reply, prepared: Sequence[str | _Prepared], base: int | None, is_newest: bool
    ) -> Generator[str, None, None]:
        """One turn: see what fits, encode what the store lacks, generate, record.  Yields the answer's text.

        base, is_newest: see Reply.  For who holds the claim.
        """
        started = time.perf_counter()
        question: tuple[str | ImageHandle, ...] = ()
        turns = self._turns[:base]
        shown: list[int] = []
        done: Done | None = None
        failed = False
        try:
            if base is not None and base >= len(self._turns):
                raise SessionError(f"turn {base + 1}, which was to be replaced, is not there any more")
            question = self._question(prepared, turns)
            if base is not None and is_newest and [turn.parts for turn in self._turns[base:]] != [question]:
                raise SessionError(f"turn {base + 1}, which was to be answered again, is not the last any more")
            marks = self._marks.of(turns)
            if base is not None:
                marks = _carried_over(self._marks, marks, self._turns, base, question)
            with contextlib.closing(self._events(reply, prepared, turns, marks, question, shown)) as events:
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
            reply.finish(started, done)
            usage = reply.usage_so_far
            self._outlook.spend(usage)
            if not failed and (reply.text_so_far or (done is not None and done.reason != "cancelled")):
                ids = self._spelled(shown, reply.text_so_far) if done is None else done.ids
                assert reply.plan_so_far is not None
                self._turns = (*turns, Turn(question, reply.text_so_far, ids, reply.reason_so_far, usage))
                self._marks = reply.plan_so_far.marks
                self._n_foreign = min(self._n_foreign, len(turns))

    def _events(
        self,
        reply: Reply,
        prepared: Sequence[str | _Prepared],
        turns: Sequence[Turn],
        marks: Marks,
        question: Sequence[str | ImageHandle],
        shown: list[int],
    ) -> Generator[Token | Done, None, None]:
        """What the engine says to the question, once its plan is made and its pictures are encoded.

        Where the engine refuses to compute so long a prompt whole, though it could add to it, a shorter one is planned.
        """
        longest: int | None = None
        while True:
            reply.plan_so_far, prompt = self._plan(turns, marks, question, reply.sampling, longest)
            sent = {piece.key for piece in prompt.pieces if isinstance(piece, ImageRows)}
            with self._store.lease(sent):
                self._encode(reply, prepared, sent)
                try:
                    yield from self._generate(reply, prompt, [*_images_of(turns), *images_in(question)], shown)
                    return
                except ContextFull as error:
                    if longest is not None or error.max_new_tokens or shown:
                        raise
                    longest = error.limit

    def _spelled(self, ids: Sequence[int], text: str) -> tuple[int, ...]:
        """The tokens of exactly the text that was shown: more may have been generated, or held back."""
        return tuple(ids_of_text(ids, text, self._tokenizer.token_bytes, self._tokenizer.encode))

    def _encode(self, reply: Reply, prepared: Sequence[str | _Prepared], sent: set[str] | None = None) -> None:
        """sent: keys of what the prompt has (a picture that was forgotten needs none); None: all may be sent."""
        wanted = [part for part in prepared if not isinstance(part, str)]
        missing: dict[str, NDArray[np.uint8]] = {}
        n_slices = 0
        for part in wanted:
            keys = [key for key in part.keys if sent is None or key in sent]
            n_slices += len(keys)
            lacking = {key for key in keys if not self._store.has(key)}
            if lacking and part.handle is not None:
                missing.update(self._make_again([part.handle], lacking))
            elif lacking:
                missing.update(pair for pair in zip(part.keys, part.slices(), strict=True) if pair[0] in lacking)
        counted = reply.usage_so_far.slices_encoded + reply.usage_so_far.slices_cached  # by encode_ahead
        reply.count(slices_cached=max(0, n_slices - len(missing) - counted))
        self._encode_slices(reply, missing)

    def _encode_slices(self, reply: Reply, missing: dict[str, NDArray[np.uint8]]) -> None:
        if not missing:
            return
        done = self._vision.encode(list(missing.items()), reply.on_progress("encode"), reply.should_stop)
        reply.count(slices_encoded=done.n_slices, restarts=done.restarts, encode_s=done.seconds)

    def _generate(
        self, reply: Reply, prompt: Prompt, images: Sequence[ImageHandle], shown: list[int]
    ) -> Iterator[Token | Done]:
        """The engine's tokens; embeddings that vanished from the store meanwhile are made again, once."""
        for attempt in (1, 2):
            if reply.should_stop():
                return
            self._outlook.asked()
            try:
                for event in self._engine.generate(prompt.pieces, reply.sampling, reply.should_stop, resume_ids=shown):
                    if isinstance(event, Prefill):
                        reply.on_progress("prefill")(event.done, event.total)
                    elif isinstance(event, Restarted):
                        reply.count(restarts=1)
                        self._outlook.lost()
                    else:
                        if isinstance(event, Token):
                            shown.append(event.id)
                        else:
                            self._outlook.sent(prompt.pieces, event.n_reused + event.n_prefilled, _fed(shown, event))
                        yield event
                return
            except MissingEmbeddings as error:
                if attempt == 2:
                    raise
                lost = set(error.keys)
            self._encode_slices(reply, self._make_again(images, lost))

    def _make_again(self, images: Sequence[ImageHandle], lost: set[str]) -> dict[str, NDArray[np.uint8]]:
        """The slices under these keys, but for embeddings that came with a saved conversation: those are put back.

        Raises ImageError, BundleError: a picture is gone, or another than the one that its keys are of.
        """
        slices: dict[str, NDArray[np.uint8]] = {}
        for image in images:
            for key in lost.intersection(image.keys) - set(slices):
                rows = image.original.embedding(key) if image.original else None
                if rows is not None:
                    self._store.put(key, rows)
                    lost.discard(key)
            if lost.intersection(image.keys) - set(slices):
                try:
                    found = image.pixels()
                except ImageError as error:
                    raise ImageError(f"{image.id} cannot be cut again: {error}") from None
                own = image.original.keys if image.original else image.keys
                if tuple(slice_key(pixels, self._spec.encoder_digest) for pixels in found) != own:
                    raise ImageError(
                        f"{image.id} ({image.name or 'a picture'}): its saved picture is not the one it was"
                    )
                slices.update(zip(image.keys, found, strict=True))
        return {key: pixels for key, pixels in slices.items() if key in lost}


@dataclass(frozen=True)
class _Prepared:
    """A picture that was read and cut, not yet part of the conversation.

    slices: the encoder's inputs.  again: cuts it once more, later.  handle: where it is one of this conversation
    already, whose slices are then what its keys say only if that is looked at (Session._make_again).
    """

    name: str
    plan: SlicePlan
    keys: tuple[str, ...]
    slices: Callable[[], list[NDArray[np.uint8]]]
    again: Callable[[], list[NDArray[np.uint8]]]
    original: Original | None
    handle: ImageHandle | None = None


class Reply:
    """An answer on its way.  Iterating yields text as it comes; it runs once, whatever is read how often.

    on_wait, where set before it runs: called with ("encode" | "prefill", done, total).
    """

    def __init__(
        self,
        session: Session,
        prepared: tuple[str | _Prepared, ...],
        sampling: Sampling,
        *,
        base: int | None = None,
        is_newest: bool = False,
    ) -> None:
        """base: how many turns of the session it comes after, in place of what is there; None: all.

        is_newest: what is there must be one turn, of the same question, when it runs.
        """
        if sampling.seed is None:  # drawn here, so that a crashed worker's successor goes on with the same one
            sampling = replace(sampling, seed=time.time_ns() & 0x7FFF_FFFF)
        self.sampling = sampling
        self.on_wait: Callable[[str, int, int], None] = lambda stage, done, total: None
        self.text_so_far = ""
        self.usage_so_far = Usage()
        self.reason_so_far: StopReason = "cancelled"
        self.plan_so_far: Plan | None = None
        self._session, self._base, self._is_newest = session, base, is_newest
        self._prepared: tuple[str | _Prepared, ...] | None = prepared  # None: it has run
        self._chunks: list[str] = []
        self._error: BaseException | None = None
        self._ended = False
        self._stop = False

    def __iter__(self) -> Iterator[str]:
        """Leaving the loop early (break, close, Ctrl-C) ends the answer and records what was shown."""
        yield from list(self._chunks)
        if self._prepared is None:
            if not self._ended:
                raise SessionError("this answer is being streamed: what there is of it is in text_so_far")
            if self._error is not None:
                raise self._error
            return
        with self._session.claim():
            prepared, self._prepared = self._prepared, None
            try:
                with contextlib.closing(self._session.run(self, prepared, self._base, self._is_newest)) as texts:
                    for text in texts:
                        self._chunks.append(text)
                        yield text
            except EngineBusy:
                self._prepared = prepared  # nothing has happened yet: it may be tried again
                raise
            except Exception as error:
                self._error = error
                raise
            finally:
                self._ended = self._prepared is None

    @property
    def text(self) -> str:
        """The whole answer; waits for its end.

        Raises SessionError, as all of these do, while the answer is read elsewhere.
        """
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

    @property
    def plan(self) -> Plan:
        """What was sent, and what it was expected to cost; waits for the end."""
        self._finish()
        assert self.plan_so_far is not None
        return self.plan_so_far

    @property
    def degraded(self) -> tuple[Change, ...]:
        """What is sent otherwise from this answer on, for it would not have fitted; waits for the end."""
        return self.plan.degraded

    def encode_ahead(self) -> None:
        """Encode the pictures now, before this answer is run: from any thread, while another one runs.

        Where the encoder and the LLM share an NPU, it waits for its turn.  Raises EngineError, StoreError.
        """
        prepared = self._prepared  # another thread may begin to run it
        if prepared is not None:
            self._session._encode(self, prepared)

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


def _images_of(turns: Sequence[Turn]) -> list[ImageHandle]:
    return [image for turn in turns for image in turn.images]


def _came_along(image: ImageHandle, keys: set[str]) -> set[str]:
    """Of these keys, the image's whose embeddings are in the file that the conversation was loaded from."""
    original = image.original
    return {key for key in keys.intersection(image.keys) if original and original.embedding(key) is not None}


def _fed(shown: Sequence[int], done: Done) -> Sequence[int]:
    """The tokens that the engine has fed itself: not the last one where that ended the answer."""
    ended = done.reason == "length" or (done.reason == "stop" and done.ids != tuple(shown))
    return shown[:-1] if ended else shown


def _carried_over(
    before: Marks, marks: Marks, turns: Sequence[Turn], base: int, question: Sequence[str | ImageHandle]
) -> Marks:
    """Where a question takes the place of the turns from base on, what was pinned of the first stays pinned.

    And, where that is the newest, what the user said to forget stays forgotten: nothing else changes how it is sent.
    """
    old = {(image.id, image.keys) for image in turns[base].images}
    same = {image.id for image in images_in(question) if (image.id, image.keys) in old}
    is_newest = base == len(turns) - 1
    forgotten = {name: form for name, form in before.forms.items() if name in same and is_newest}
    return replace(
        marks,
        forms={**marks.forms, **forgotten},
        pinned=marks.pinned | (before.pinned & same),
        pinned_turns=marks.pinned_turns | (before.pinned_turns & {base + 1}),
    )


def _without(values: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    return {key: value for key, value in values.items() if key != name}
