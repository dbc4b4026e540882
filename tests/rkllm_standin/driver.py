"""The smallest program that runs a library with the RKLLM ABI: for tests of the stand-in itself, not of mmchat."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmchat.rkllm_abi import (
    FAMILIES,
    RKLLM_INPUT_EMBED,
    RKLLM_RUN_ERROR,
    RKLLM_RUN_FINISH,
    RKLLM_RUN_NORMAL,
    LLMHandle,
)

_GREEDY = {"top_k": 1, "top_p": 1.0, "temperature": 0.0, "repeat_penalty": 1.0}


@dataclass
class Outcome:
    """What one run called back.  events: (state, text, token id) of each callback; perf: of the last FINISH."""

    code: int = 0
    events: list[tuple[int, bytes | None, int]] = field(default_factory=list)
    perf: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return [token for state, _, token in self.events if state not in (RKLLM_RUN_FINISH, RKLLM_RUN_ERROR)]

    @property
    def text(self) -> bytes:
        return b"".join(text for _, text, _ in self.events if text)

    @property
    def finished(self) -> bool:
        return any(state == RKLLM_RUN_FINISH for state, _, _ in self.events)


class Driver:
    """One handle.  param: fields of RKLLMParam over greedy defaults, extend_param's too."""

    def __init__(self, library: Path, family: str, model: Path, **param: Any) -> None:
        self.abi = abi = FAMILIES[family]
        self.library = ctypes.CDLL(str(library))
        abi.bind(self.library)
        self.param = abi.default_param(self.library)
        values = {"max_context_len": 2048, "max_new_tokens": 64, "skip_special_token": True, **_GREEDY, **param}
        for name, value in values.items():
            setattr(self.param if hasattr(self.param, name) else self.param.extend_param, name, value)
        self.param.model_path = str(model).encode()
        self.handle = LLMHandle()
        self.outcome = Outcome()
        self.on_token: Any = lambda outcome: 0
        self._callback = abi.LLMResultCallback(self._called)
        self._callbacks: Any = None
        third: Any = self._callback
        if abi.callback_struct:
            self._callbacks = abi.RKLLMCallback(result_callback=self._callback)
            third = byref(self._callbacks)
        self.code = self.library.rkllm_init(byref(self.handle), byref(self.param), third)

    def _called(self, result: Any, userdata: Any, state: int) -> int:
        value = result.contents
        self.outcome.events.append((state, value.text, value.token_id))
        if state == RKLLM_RUN_FINISH and self.abi.perf:
            self.outcome.perf = {name: getattr(value.perf, name) for name, *_ in value.perf._fields_}
        return self.on_token(self.outcome) if state == RKLLM_RUN_NORMAL else 0

    def run(self, rows: NDArray[np.float32], *, keep_history: int = 0, sampling: Any = None, **infer: Any) -> Outcome:
        """Embedding input.  rows: (n, hidden) float32, C-contiguous.  infer: fields of RKLLMInferParam."""
        given = self.abi.RKLLMInput()
        given.input_type = RKLLM_INPUT_EMBED
        if self.abi.has_role:
            given.role = b"user"
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        given.embed_input = self.abi.RKLLMEmbedInput(pointer, len(rows))
        how = self.abi.RKLLMInferParam(**infer)
        if self.abi.keep_history:
            how.keep_history = keep_history
        if sampling is not None:
            how.sampling_params = ctypes.pointer(sampling)
        self.outcome = Outcome()
        self.outcome.code = self.library.rkllm_run(self.handle, byref(given), byref(how), c_void_p())
        return self.outcome

    def kv_size(self) -> int:
        sizes = (c_int * 1)(-1)
        assert self.library.rkllm_get_kv_cache_size(self.handle, sizes) == 0
        return sizes[0]

    def clear(self) -> int:
        rest = (None, None) if self.abi.clear_kv_args == 4 else ()
        return int(self.library.rkllm_clear_kv_cache(self.handle, 0, *rest))

    def abort(self) -> int:
        return int(self.library.rkllm_abort(self.handle))

    def close(self) -> None:
        if self.handle:
            self.library.rkllm_destroy(self.handle)
            self.handle = LLMHandle()

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
