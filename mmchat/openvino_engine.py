"""The LLM on OpenVINO's CPU plug-in.

KV caches are kept between requests; a request is compared with what they hold, the nearest is rewound to the common
prefix, and only what differs is computed.  There are several, so that conversations that take turns do not displace
each other (mmchat.model_dir.cpu_caches says how many).

Found with OpenVINO 2026.4.1 and relied on here: rewinding by cutting the states is exact; InferRequest.cancel() tears
the states, so cancelling is a flag between chunks; any exception inside infer() poisons the compiled model, so it is
dropped and made again; inference precision and KV precision depend on the host unless accuracy is asked for.

This module knows no template and no pictures: pieces in, tokens out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint
from mmchat.decoding import TextStream, choose, ids_of_text
from mmchat.embed_table import EmbedTable
from mmchat.embedding import RowKey, assemble, choose_cache, row_keys
from mmchat.engine import Done, Event, Piece, Prefill, Sampling, StopReason, Token, Tokens, check_fits
from mmchat.errors import EngineError, PromptError
from mmchat.model_dir import LlmSpec, ModelSpec, cpu_caches
from mmchat.openvino_graphs import build_llm, cpu_properties
from mmchat.openvino_ir import input_names, open_table, read_llm
from mmchat.prompt import ChatTokenizer

PREFILL_CHUNK_ROWS = 256
# A run's length brings compiled kernels of its own, 0.25 MB with the demo model, of which OpenVINO and oneDNN keep a
# thousand and more: no conversation's memory was ever flat.  16 hold those of a token and of the latest runs; nothing
# became slower by it (4 and 28 layers, runs of random length).
_KERNELS_KEPT = "16"


def open_engine(
    spec: ModelSpec, tokenizer: ChatTokenizer, load_image: Callable[[str], NDArray[np.float32] | None], **options: Any
) -> OpenVinoEngine:
    """The engine of a checkpoint, or of an OpenVINO folder.  options: OpenVinoEngine's.  Raises ModelDirError."""
    if spec.openvino:
        model, table = read_llm(spec.openvino["llm"], spec.llm), open_table(spec.openvino["text_embeddings"])
        return OpenVinoEngine(model, spec.llm, table, tokenizer, load_image, **options)
    table = EmbedTable.open(spec.embed_table_path)
    return OpenVinoEngine(Checkpoint(spec.folder), spec.llm, table, tokenizer, load_image, **options)


@dataclass
class _Cache:
    """The states of one request object, and the rows that they hold."""

    request: ov.InferRequest
    held: list[RowKey] = field(default_factory=list)


class OpenVinoEngine:
    """An Engine (mmchat.engine).  For one thread."""

    def __init__(
        self,
        source: Checkpoint | ov.Model,
        spec: LlmSpec,
        table: EmbedTable,
        tokenizer: ChatTokenizer,
        load_image: Callable[[str], NDArray[np.float32] | None],
        *,
        context_rows: int | None = None,
        n_threads: int | None = None,
        chunk_rows: int = PREFILL_CHUNK_ROWS,
        n_caches: int | None = None,
    ) -> None:
        """source: the checkpoint, or a model with build_llm's inputs, outputs and states, as
            mmchat.openvino_ir reads one.
        load_image: the embedding under a store key, or None where it is not there.  n_caches: KV caches at most.

        Raises ModelDirError where checkpoint, table and tokenizer do not belong together.
        """
        table.check_belongs(spec.hidden_size, tokenizer.n_ids)
        self._spec, self._table, self._tokenizer, self._load_image = spec, table, tokenizer, load_image
        self._context_rows = min(context_rows or spec.context_rows, spec.context_rows)
        self._chunk_rows = chunk_rows
        self._properties = {**cpu_properties(n_threads), "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS_KEPT}
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)  # read when a model first runs
        self._core = ov.Core()
        self._model = source if isinstance(source, ov.Model) else build_llm(source, spec)
        self._inputs = input_names(self._model)
        self._n_caches = n_caches or cpu_caches(spec, self._context_rows)
        self._caches: list[_Cache] = []
        self._compile()

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
        """See Engine.generate."""
        started = time.perf_counter()
        rows = row_keys(pieces)
        if not rows:
            raise PromptError("the prompt is empty")
        check_fits(len(rows), sampling.max_new_tokens, self._context_rows)
        if not self._caches:  # compiling failed, too, after an inference had failed
            self._compile()
        wanted = rows + list(resume_ids)
        source, target, kept = choose_cache([cache.held for cache in self._caches], wanted, self._n_caches)
        embeds = assemble([*pieces, Tokens(tuple(resume_ids))], self._table, self._load_image, skip=kept)
        self._rewind(source, target, kept)

        generated = list(resume_ids)
        stream = TextStream(self._tokenizer.token_bytes, sampling.stop)
        for token in resume_ids:
            stream.push(token)
        n_reused = min(kept, len(rows))
        reason: StopReason = "cancelled"
        logits: NDArray[np.float32] | None = None
        for start in range(0, len(embeds), self._chunk_rows):
            if should_stop():
                break
            chunk = embeds[start : start + self._chunk_rows]
            logits = self._feed(chunk, wanted[kept + start : kept + start + len(chunk)])
            yield Prefill(start + len(chunk), len(embeds))
        prefilled = time.perf_counter()

        while logits is not None and len(self._cache.held) >= len(wanted):
            if stream.stopped:
                reason = "stop"
                break
            if should_stop():
                break
            if len(generated) >= sampling.max_new_tokens:
                reason = "length"
                break
            token = choose(logits[: self._tokenizer.n_ids], sampling, generated)
            if token in self._tokenizer.stop_ids:
                reason = "stop"
                break
            generated.append(token)
            yield Token(token, stream.push(token))
            if len(generated) < sampling.max_new_tokens and not stream.stopped:
                logits = self._feed(self._table.rows([token]), [token])
        rest = stream.finish()
        ids = generated
        if stream.stopped:
            ids = ids_of_text(generated, stream.text, self._tokenizer.token_bytes, self._tokenizer.encode)
        n_fed = max(0, min(len(self._cache.held), len(rows)) - n_reused)
        yield Done(
            reason=reason,
            text=rest,
            ids=tuple(ids),
            n_prompt=len(rows),
            n_reused=n_reused,
            n_prefilled=n_fed,
            n_new=len(generated),
            prefill_s=prefilled - started,
            generate_s=time.perf_counter() - prefilled,
        )

    def forget(self) -> None:
        """Hold nothing: the next answer is computed whole."""
        self._caches = [_Cache(self._compiled.create_infer_request())]

    def _feed(self, embeds: NDArray[np.float32], keys: list[RowKey]) -> NDArray[np.float32]:
        """Append rows to the current cache; (vocab,) scores after the last of them."""
        past, n = len(self._cache.held), len(embeds)
        try:
            inputs = {
                "inputs_embeds": embeds[None],
                "attention_mask": np.ones((1, past + n), np.int64),
                "position_ids": np.arange(past, past + n, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            result = self._cache.request.infer({name: inputs[name] for name in self._inputs})
            logits = np.array(result["logits"][0, -1], np.float32)
        except Exception as error:
            self._compile_again()
            raise EngineError(f"OpenVINO failed at row {past} ({' '.join(str(error).split())[:300]})") from None
        self._cache.held += keys
        return logits

    @property
    def _cache(self) -> _Cache:
        """The current one: the last that was used."""
        return self._caches[-1]

    def _rewind(self, source: int, target: int, n: int) -> None:
        """Have a current cache, the target, with the first n rows of the source."""
        if target == len(self._caches):
            self._caches.append(_Cache(self._compiled.create_infer_request()))
        nearest, cache = self._caches[source], self._caches[target]
        try:
            if n == 0:
                cache.request.reset_state()
            elif cache is not nearest or n < len(nearest.held):
                states = {state.name: state for state in cache.request.query_state()}
                for state in nearest.request.query_state():
                    states[state.name].state = ov.Tensor(state.state.data[:, :, :n, :].copy())
        except Exception as error:
            self._compile_again()
            raise EngineError(f"OpenVINO could not rewind to row {n} ({' '.join(str(error).split())[:300]})") from None
        cache.held = nearest.held[:n]
        self._caches.append(self._caches.pop(target))

    def _compile_again(self) -> None:
        """After a failure, which is what is to be told, not another one: the next request tries once more."""
        with contextlib.suppress(Exception):
            self._compile()

    def _compile(self) -> None:
        self._caches = []
        self._compiled: Any = None  # a large model is not there twice
        self._compiled = self._core.compile_model(self._model, "CPU", self._properties)
        self._caches = [_Cache(self._compiled.create_infer_request())]
