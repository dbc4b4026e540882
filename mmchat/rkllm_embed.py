"""The LLM on RKLLM, fed with embeddings: the engine that this project exists for.

RKLLM has five incompatible ABIs (mmchat.rkllm_abi) and no documented answer to what its KV cache holds after a run of
embedding input.  So the engine has three strategies and believes none of them unchecked:

    resend   clear the KV cache and send the whole conversation: right on every version
    prefix   send the whole conversation, the library skips the prefix it knows (1.2.3 and later);
             checked by perf.prefill_tokens; cleared first where the conversation was edited, unless `rewinds`
    append   keep the history and send only what is new; checked by rkllm_get_kv_cache_size

`mmchat calibrate` finds out, on the user's own library and model, which one holds; without its profile it is resend.
A result that does not match the expected counts falls back to resend at once, for good, and says so.

What RKLLM cannot do: there is no seed, so sampled answers do not repeat; penalties see the tokens of one run alone,
so not those shown before a crash; up to 1.2.3 sampling is set when the model is loaded (SamplingFixed).

This module runs in the LLM worker only.  It loads vendor code; no board was at hand when it was written: it was tested
against a stand-in library with the real ABI (tests/rkllm_standin).
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mmchat import rkllm_abi
from mmchat.decoding import TextStream, ids_of_text
from mmchat.embed_table import EmbedTable
from mmchat.embedding import RowKey, assemble, common_prefix, row_keys
from mmchat.engine import Done, Event, Piece, Prefill, Sampling, StopReason, Token, Tokens, check_fits
from mmchat.errors import ContextFull, EngineError, ModelDirError, PromptError, SamplingFixed
from mmchat.model_dir import MARGIN_ROWS, ModelSpec
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_detect import Detection, detect

Strategy = Literal["resend", "prefix", "append"]

# RKNN models live in domain 0; with one beside it the LLM starts in domain 1 (RK3588, RK3576).
BASE_DOMAIN = 1
_N_CPUS = 4  # the vendor's default; fewer than the model's NPU cores fail rkllm_init
_POLL_S = 0.05
_SEE_LOG = "see ~/.local/state/mmchat/rkllm.log"
_ABORT_AGAIN_S = 1.0


@dataclass(frozen=True)
class Findings:
    """What calibration found out about one library and model.

    rewinds: with prefix, rows that differ from the cache's are noticed, image rows too.
    safe_rows: the most rows that one run may have; None where no run has crashed.
    """

    strategy: Strategy = "resend"
    rewinds: bool = False
    safe_rows: int | None = None


def load_board(
    spec: ModelSpec, library: Path, *, family: str | None = None, context_rows: int, sampling: Sampling
) -> tuple[RkllmModel, EmbedTable, ChatTokenizer, Detection]:
    """Check all that can be checked before the vendor's code runs, then load a board folder's model.

    context_rows: what prompt and answer may take together.  family: the user's word for the library's ABI.

    Raises ModelDirError: files that do not belong together; EngineError: the library (see rkllm_detect), the model.
    """
    if spec.board is None:
        raise ModelDirError(f"{spec.folder}: no mmchat.json, so no model for RKLLM")
    if not 1 <= context_rows <= spec.context_rows:
        raise ModelDirError(f"a context of {context_rows} rows: {spec.board.llm_path} allows 1 to {spec.context_rows}")
    table, tokenizer = EmbedTable.open(spec.embed_table_path), ChatTokenizer(spec.tokenizer_path)
    table.check_belongs(spec.llm.hidden_size, tokenizer.n_ids)
    if tokenizer.stop_ids != spec.board.stop_ids:
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


class RkllmModel:
    """One loaded model: the C calls, each with its checks.  For one thread, except for abort."""

    def __init__(
        self,
        library: Path,
        family: rkllm_abi.Family,
        model: Path,
        *,
        context_rows: int,
        hidden_size: int,
        n_tokens: int,
        sampling: Sampling,
        base_domain: int = BASE_DOMAIN,
    ) -> None:
        """Loads for 10 to 40 seconds.

        context_rows: max_context_len, answer included.  n_tokens: of the vocabulary.
        sampling: what the library uses where it cannot be set per run.

        Raises EngineError: the library cannot be loaded, or refuses the model.
        """
        self.family, self.loaded_sampling = family, sampling
        self._hidden_size, self._n_tokens = hidden_size, n_tokens
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise EngineError(f"{library}: cannot be loaded ({error})") from None
        family.bind(self._library)
        param = family.default_param(self._library)
        self._kept: list[Any] = [str(model).encode()]  # what the library may still point to
        param.model_path = self._kept[0]
        param.max_context_len = context_rows
        param.max_new_tokens = context_rows
        param.skip_special_token = False  # else the end token would not be seen
        param.is_async = False
        extend = param.extend_param
        extend.base_domain_id = base_domain
        if family.keep_history:  # i.e. from 1.2.0; a library that leaves defaults out would fail here
            extend.enabled_cpus_num = extend.enabled_cpus_num or _N_CPUS
        if family.n_batch:
            extend.n_batch = 1
        self._set_sampling(param, sampling)
        self._handle = rkllm_abi.LLMHandle()
        callback: Any = _callback(family)
        if family.callback_struct:
            struct: Any = family.RKLLMCallback()
            struct.result_callback = callback
            self._kept.append(struct)
            callback = ctypes.byref(struct)
        code = self._library.rkllm_init(ctypes.byref(self._handle), ctypes.byref(param), callback)
        if code != 0 or not self._handle:
            raise EngineError(
                f"rkllm_init returned {code} {'and no handle ' if code == 0 else ''}for {model}; {_SEE_LOG}; "
                "usual causes are too little NPU memory, a driver below 0.9.7, or a context beyond the model's"
            )
        self._kept.append(param)
        if family.chat_template:  # embedding input carries its own template
            self._check("rkllm_set_chat_template", self._handle, b"", b"", b"")

    def close(self) -> None:
        """Unload the model.  The worker never does: to end the process frees the NPU's memory for certain."""
        handle, self._handle = self._handle, rkllm_abi.LLMHandle()
        if handle:
            self._library.rkllm_destroy(handle)

    def run(
        self, embeds: NDArray[np.float32], *, keep_history: bool, sampling: Sampling, should_stop: Callable[[], bool]
    ) -> Iterator[Message]:
        """Run embeds (n, hidden) and yield what the callback brings; ends with a Returned.

        Leaving early, or should_stop, aborts the run and waits for its end: during prefill that takes a while.
        What the library still generates after that is dropped.
        """
        n = len(embeds)
        good = embeds.shape == (n, self._hidden_size) and embeds.dtype == np.float32 and embeds.flags.c_contiguous
        if not good or n < 1:
            raise PromptError(f"RKLLM takes C-contiguous float32 (n >= 1, {self._hidden_size}), not {embeds.shape}")
        input_: Any = self.family.RKLLMInput()
        if self.family.has_role:
            input_.role, input_.enable_thinking = b"user", False
        input_.input_type = rkllm_abi.RKLLM_INPUT_EMBED
        input_.embed_input.embed = embeds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        input_.embed_input.n_tokens = n
        infer: Any = self.family.RKLLMInferParam()
        infer.mode = rkllm_abi.RKLLM_INFER_GENERATE
        if self.family.keep_history:
            infer.keep_history = int(keep_history)
        if self.family.run_sampling:
            values: Any = self.family.RKLLMSamplingParam()
            self._set_sampling(values, sampling)
            infer.sampling_params = ctypes.pointer(values)
            infer.max_new_tokens = sampling.max_new_tokens
        run, aborted = _Run(self.family), threading.Event()

        def call() -> None:
            code = self._library.rkllm_run(self._handle, ctypes.byref(input_), ctypes.byref(infer), run.number)
            run.messages.put(Returned(code, run.finished, run.failed, aborted.is_set(), run.prefilled))

        thread = threading.Thread(target=call, name="rkllm_run")
        thread.start()
        abort_at = 0.0
        message: Message | None = None
        try:
            while not isinstance(message, Returned):
                if (aborted.is_set() or should_stop()) and time.monotonic() >= abort_at:
                    aborted.set()
                    abort_at = time.monotonic() + _ABORT_AGAIN_S  # one that came too early has no effect
                    self._library.rkllm_abort(self._handle)
                try:
                    message = run.messages.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if isinstance(message, Returned) or not aborted.is_set():
                    yield message
        finally:
            while thread.is_alive():  # the arrays must live until the library is done with them
                if not isinstance(message, Returned):
                    self._library.rkllm_abort(self._handle)
                thread.join(_ABORT_AGAIN_S)
            run.forget()

    def clear(self) -> None:
        """Empty the KV cache, where there is one to empty."""
        if self.family.clear_kv_args == 2:
            self._check("rkllm_clear_kv_cache", self._handle, 0)
        elif self.family.clear_kv_args == 4:
            self._check("rkllm_clear_kv_cache", self._handle, 0, None, None)

    def kv_rows(self) -> int | None:
        """Rows in the KV cache; None where the library cannot tell."""
        if not self.family.kv_cache_size:
            return None
        sizes = (ctypes.c_int * 8)()  # one per batch; n_batch is 1
        self._check("rkllm_get_kv_cache_size", self._handle, sizes)
        return int(sizes[0])

    def _set_sampling(self, target: Any, sampling: Sampling) -> None:
        """Fill RKLLMParam or RKLLMSamplingParam: every field, for those of a run have no defaults."""
        values = settings(sampling)
        target.top_k = values["top_k"] or self._n_tokens
        target.top_p, target.temperature = values["top_p"], values["temperature"]
        target.repeat_penalty = values["repetition_penalty"]
        target.frequency_penalty = target.presence_penalty = 0.0
        target.mirostat, target.mirostat_tau, target.mirostat_eta = 0, 5.0, 0.1

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise EngineError(f"{name} returned {code} (RKLLM {self.family.name}); {_SEE_LOG}")


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
        findings = findings or Findings()
        self._model, self._table, self._tokenizer, self._load_image = model, table, tokenizer, load_image
        self._context_rows, self._safe_rows, self._rewinds = context_rows, findings.safe_rows, findings.rewinds
        self.strategy: Strategy = _possible(findings.strategy, model.family)
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
        answer = _Answer(self._tokenizer, sampling, resume_ids, self._model.family.run_sampling)
        wanted = rows + list(resume_ids)
        known = common_prefix(self._held or [], wanted)
        skip = self._skip(wanted, known)
        embeds = assemble([*pieces, Tokens(tuple(resume_ids))], self._table, self._load_image, skip=skip)
        if self._safe_rows is not None and len(embeds) > self._safe_rows:
            raise ContextFull(len(embeds), 0, self._safe_rows)

        returned, prefilled = None, started
        if answer.reason is None and not should_stop():
            yield Prefill(0, len(embeds))
            if not skip and not self._may_keep(known):
                self._model.clear()
            self._held = None  # until the run has ended well
            for message in self._model.run(
                embeds,
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

        n_new_rows = len(wanted)  # of wanted, that were computed
        if returned is None:
            n_new_rows = 0
        elif self.strategy != "prefix" or returned.prefilled is None:
            n_new_rows = len(embeds)
        else:
            n_new_rows = min(max(returned.prefilled, 1), len(wanted))  # the last row is computed even in a whole hit
        if returned is not None and returned.finished and not returned.aborted and answer.complete:
            self._held = self._after(wanted, answer, known=known, n_sent=len(embeds), prefilled=returned.prefilled)
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
            prefill_s=prefilled - started,
            generate_s=time.perf_counter() - prefilled,
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

    def _after(
        self, wanted: list[RowKey], answer: _Answer, *, known: int, n_sent: int, prefilled: int | None
    ) -> list[RowKey] | None:
        """What the KV cache holds after a run that ended by itself; None where the counts do not add up."""
        if self.strategy == "resend":
            return None
        n_answer = len(answer.ids) - answer.n_resumed
        if self.strategy == "prefix" and prefilled is not None and prefilled < len(wanted) - known:
            self._distrust(f"{prefilled} rows were prefilled where {len(wanted) - known} were new")
            return None
        kv = self._model.kv_rows()
        n_fed = -1 if kv is None else kv - len(wanted)
        fed: list[RowKey] = [*wanted, *answer.ids[answer.n_resumed :]]
        if n_fed == n_answer + 1 and answer.stop_id is not None:
            return [*fed, answer.stop_id]
        if max(0, n_answer - 1) <= n_fed <= n_answer:
            return fed[: len(wanted) + n_fed]
        if self.strategy == "append":
            self._distrust(f"{kv} rows are cached where {len(wanted)} were sent and {n_answer} generated")
        return None

    def _distrust(self, why: str) -> None:
        print(f"mmchat: this library does not keep to {self.strategy} ({why}); from now on resend", file=sys.stderr)
        self.strategy = "resend"


class _Answer:
    """The tokens of one answer as they come, whatever the library thinks of their end."""

    def __init__(
        self, tokenizer: ChatTokenizer, sampling: Sampling, resume_ids: Sequence[int], ends_itself: bool
    ) -> None:
        """ends_itself: the library knows max_new_tokens of this very run."""
        self._tokenizer, self._sampling, self._ends_itself = tokenizer, sampling, ends_itself
        self.ids = list(resume_ids)
        self.n_resumed = len(self.ids)
        self._lost, self._told = b"", b""
        self.complete = True  # the library told every token
        self.stream = TextStream(lambda token: self._lost + tokenizer.token_bytes(token), sampling.stop)
        for token in resume_ids:
            self.stream.push(token)
        self.reason: StopReason | None = None
        if self.stream.stopped:
            self.reason = "stop"
        elif len(self.ids) >= sampling.max_new_tokens:
            self.reason = "length"
        self.stop_id: int | None = None
        self.must_abort = False

    def push(self, generated: Generated) -> str | None:
        """The text to show, or None for a token that is not part of the answer."""
        token = generated.token_id
        if self.reason is not None:  # the library missed the end (1.3.0 with older models does)
            self.must_abort = True
            return None
        if token in self._tokenizer.stop_ids:
            self.reason, self.stop_id = "stop", token
            return None
        own = self._tokenizer.token_bytes(token)
        self._lost = _lost_bytes(generated.text, own, self._told)
        self._told = (self._told + self._lost + own)[-4:]
        self.complete = self.complete and not self._lost
        self.ids.append(token)
        text = self.stream.push(token)
        if self.stream.stopped:
            self.reason, self.must_abort = "stop", True
        elif len(self.ids) >= self._sampling.max_new_tokens:
            # Where the library stops by itself, let it: its KV cache stays known.
            self.reason, self.must_abort = "length", not self._ends_itself
        return text

    def end(self, returned: Returned, *, cancelled: bool) -> None:
        """Why the run ended, where neither a stop token nor we ended it.  Raises EngineError where it failed."""
        if self.reason is not None or (cancelled and returned.aborted):
            return
        if returned.failed or returned.code != 0:
            raise EngineError(f"rkllm_run failed (code {returned.code}); {_SEE_LOG}")
        if not returned.finished and len(self.ids) == self.n_resumed:
            raise EngineError(f"rkllm_run came back with neither an answer nor an error; {_SEE_LOG}")
        self.reason = "stop"

    def spelled(self) -> tuple[int, ...]:
        """The tokens of exactly the text that was shown."""
        if not self.stream.stopped and self.complete:
            return tuple(self.ids)
        return tuple(ids_of_text(self.ids, self.stream.text, self._tokenizer.token_bytes, self._tokenizer.encode))


def _lost_bytes(text: bytes, own: bytes, told: bytes) -> bytes:
    """Bytes of tokens that the library called nobody back for, since they ended within a character.

    text: what it says with a token whose own bytes are `own`; told: the last bytes of the tokens before it.
    """
    before = text[: len(text) - len(own)] if own and text.endswith(own) else b""
    return b"" if told.endswith(before) or any(byte < 0x80 for byte in before) else before


@dataclass(frozen=True)
class Generated:
    """text: of this token and the unfinished ones before it; empty where the library waits for more."""

    token_id: int
    text: bytes


@dataclass(frozen=True)
class Returned:
    """rkllm_run came back.  finished, failed: the state callbacks that came; prefilled: perf.prefill_tokens."""

    code: int
    finished: bool
    failed: bool
    aborted: bool
    prefilled: int | None


Message = Generated | Returned


class _Run:
    """One rkllm_run, found by its number from inside the callback."""

    _numbers = iter(range(1, sys.maxsize))
    live: ClassVar[dict[int, _Run]] = {}

    def __init__(self, family: rkllm_abi.Family) -> None:
        self._has_perf = family.perf
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.finished = self.failed = False
        self.prefilled: int | None = None
        self.number = next(self._numbers)
        self.live[self.number] = self

    def forget(self) -> None:
        self.live.pop(self.number, None)

    def on_result(self, result: Any, state: int) -> None:
        """Copies at once: the library's memory is its own again when the callback returns."""
        if state == rkllm_abi.RKLLM_RUN_FINISH:
            self.finished = True
            if self._has_perf and result:
                self.prefilled = int(result.contents.perf.prefill_tokens)
        elif state == rkllm_abi.RKLLM_RUN_ERROR:
            self.failed = True
        elif result and result.contents.token_id >= 0:
            text = result.contents.text if state == rkllm_abi.RKLLM_RUN_NORMAL else None
            self.messages.put(Generated(int(result.contents.token_id), text or b""))


def _callback(family: rkllm_abi.Family) -> Any:
    """One trampoline per ABI that is never collected and lets no exception into C."""
    if family.name not in _TRAMPOLINES:

        def trampoline(result: Any, userdata: int | None, state: int) -> int:
            try:
                run = _Run.live.get(userdata or 0)
                if run is not None:
                    run.on_result(result, state)
            except BaseException as error:
                print(f"mmchat: error in the RKLLM callback: {error!r}", file=sys.stderr)
            return 0

        _TRAMPOLINES[family.name] = family.LLMResultCallback(trampoline)
    return _TRAMPOLINES[family.name]


_TRAMPOLINES: dict[str, Any] = {}


def settings(sampling: Sampling) -> dict[str, Any]:
    """What RKLLM is told; equal values give the same answers.  Greedy is top_k 1, as in the vendor's examples."""
    greedy = sampling.temperature == 0
    return {
        "temperature": 1.0 if greedy else sampling.temperature,
        "top_k": 1 if greedy else sampling.top_k,
        "top_p": 1.0 if greedy else sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }


def _possible(strategy: Strategy, family: rkllm_abi.Family) -> Strategy:
    """The strategy, where the ABI has what its checks need."""
    if strategy == "append" and not (family.keep_history and family.kv_cache_size):
        return "resend"
    if strategy == "prefix" and not family.perf:
        return "resend"
    return strategy
