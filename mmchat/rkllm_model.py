"""One model loaded by RKLLM: the C calls, each with its checks.

What is known here is the ABI (mmchat.rkllm_abi) and how a run of embedding input goes: rows in, one callback per token,
the call returns.  What the KV cache holds after it, and what a conversation is, is mmchat.rkllm_embed's business.

For the LLM worker only: this loads vendor code.  No board was at hand when it was written: it was tested against a
stand-in library with the real ABI (tests/rkllm_standin).
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmchat import rkllm_abi
from mmchat.engine import Sampling
from mmchat.errors import EngineError, PromptError

# RKNN models live in domain 0; with one beside it the LLM starts in domain 1 (RK3588, RK3576).
BASE_DOMAIN = 1
SEE_LOG = "see ~/.local/state/mmchat/rkllm.log"
_N_CPUS = 4  # the vendor's default; fewer than the model's NPU cores fail rkllm_init
_POLL_S = 0.05
_ABORT_AGAIN_S = 1.0


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
            self._library = ctypes.CDLL(os.path.abspath(library))  # a bare name would be searched for
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
                f"rkllm_init returned {code} {'and no handle ' if code == 0 else ''}for {model}; {SEE_LOG}; "
                "usual causes are too little NPU memory, a driver below 0.9.7, or a context beyond the model's (give "
                "--context then)"
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
            run.messages.put(Returned(code, run.finished, run.failed, aborted.is_set(), run.perf))

        thread = threading.Thread(target=call, name="rkllm_run")
        thread.start()
        abort_at, n_dropped = 0.0, 0
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
                if isinstance(message, Returned):
                    # An abort that came when all was done still cut the answer, where some of it was not taken yet.
                    yield replace(message, aborted=True) if n_dropped else message
                elif aborted.is_set():
                    n_dropped += 1
                else:
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
            raise EngineError(f"{name} returned {code} (RKLLM {self.family.name}); {SEE_LOG}")


@dataclass(frozen=True)
class Generated:
    """text: of this token and the unfinished ones before it; empty where the library waits for more."""

    token_id: int
    text: bytes


@dataclass(frozen=True)
class Perf:
    """The library's own counters of a run (1.2.1 and later): rows that it computed, and seconds."""

    prefilled: int
    prefill_s: float
    generate_s: float


@dataclass(frozen=True)
class Returned:
    """rkllm_run came back.  finished, failed: the state callbacks that came.  aborted: it was cut short by us."""

    code: int
    finished: bool
    failed: bool
    aborted: bool
    perf: Perf | None

    def check(self) -> None:
        """Raises EngineError for a run that failed."""
        if self.failed or self.code != 0:
            raise EngineError(f"rkllm_run failed (code {self.code}); {SEE_LOG}")


Message = Generated | Returned


class _Run:
    """One rkllm_run, found by its number from inside the callback."""

    _numbers = iter(range(1, sys.maxsize))
    live: ClassVar[dict[int, _Run]] = {}

    def __init__(self, family: rkllm_abi.Family) -> None:
        self._has_perf = family.perf
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.finished = self.failed = False
        self.perf: Perf | None = None
        self.number = next(self._numbers)
        self.live[self.number] = self

    def forget(self) -> None:
        self.live.pop(self.number, None)

    def on_result(self, result: Any, state: int) -> None:
        """Copies at once: the library's memory is its own again when the callback returns."""
        if state == rkllm_abi.RKLLM_RUN_FINISH:
            self.finished = True
            if self._has_perf and result:
                perf = result.contents.perf
                self.perf = Perf(
                    int(perf.prefill_tokens), perf.prefill_time_ms / 1000.0, perf.generate_time_ms / 1000.0
                )
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
