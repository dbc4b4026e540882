"""The LLM on OpenVINO's CPU plug-in.

The KV cache is kept between requests; a request is compared with what the cache holds, rewound to the common prefix,
and only what differs is computed.  Found with OpenVINO 2026.4.1 and relied on here: rewinding by cutting the states
is exact; InferRequest.cancel() tears the states, so cancelling is a flag between chunks; any exception inside infer()
poisons the compiled model, so it is dropped and made again; inference precision and KV precision depend on the host
unless accuracy is asked for.

This module knows no template and no pictures: pieces in, tokens out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from mmchat.checkpoint import Checkpoint
from mmchat.decoding import TextStream, choose, ids_of_text
from mmchat.embed_table import EmbedTable
from mmchat.engine import Done, Event, ImageRows, Piece, Prefill, Sampling, StopReason, Token, Tokens, check_fits
from mmchat.errors import EngineError, MissingEmbeddings, ModelDirError, PromptError
from mmchat.model_dir import LlmSpec
from mmchat.openvino_graphs import build_llm
from mmchat.prompt import ChatTokenizer

PREFILL_CHUNK_ROWS = 256

RowKey = int | tuple[str, int]  # a token id, or a row of an image embedding


class OpenVinoEngine:
    """An Engine (mmchat.engine) with one KV cache.  For one thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: LlmSpec,
        table: EmbedTable,
        tokenizer: ChatTokenizer,
        load_image: Callable[[str], NDArray[np.float32] | None],
        *,
        context_rows: int | None = None,
        n_threads: int | None = None,
        chunk_rows: int = PREFILL_CHUNK_ROWS,
    ) -> None:
        """load_image: the embedding under a store key, or None where it is not there.

        Raises ModelDirError where checkpoint, table and tokenizer do not belong together.
        """
        if table.width != spec.hidden_size or table.n_ids < tokenizer.n_ids:
            raise ModelDirError(
                f"{table.path}: rows {table.n_ids} x {table.width}, but the model is {spec.hidden_size} wide "
                f"and its tokenizer has {tokenizer.n_ids} tokens"
            )
        self._spec, self._table, self._tokenizer, self._load_image = spec, table, tokenizer, load_image
        self._context_rows = min(context_rows or spec.context_rows, spec.context_rows)
        self._chunk_rows = chunk_rows
        self._properties: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY"}
        if n_threads:
            self._properties["INFERENCE_NUM_THREADS"] = n_threads
        self._core = ov.Core()
        self._model = build_llm(checkpoint, spec)
        self._held: list[RowKey] = []  # what the KV cache holds
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
        wanted = rows + list(resume_ids)
        # The last row is always computed: its output is what the first token is chosen from.
        kept = min(_common_prefix(self._held, wanted), len(wanted) - 1)
        embeds = self._embed([*pieces, Tokens(tuple(resume_ids))], kept)
        self._rewind(kept)

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

        while logits is not None and len(self._held) >= len(wanted):
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
            if stream.stopped:
                reason = "stop"
                break
            if len(generated) < sampling.max_new_tokens:
                logits = self._feed(self._table.rows([token]), [token])
        cut_off = stream.stopped
        rest = stream.finish()
        ids = generated
        if cut_off:
            ids = ids_of_text(generated, stream.text, self._tokenizer.token_bytes, self._tokenizer.encode)
        n_fed = max(0, min(len(self._held), len(rows)) - n_reused)
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

    def _embed(self, pieces: Sequence[Piece], skip: int) -> NDArray[np.float32]:
        """Rows of all pieces but the first `skip` rows: (n, hidden) float32, C-contiguous.

        Everything is checked here, before the model sees any of it.
        """
        total = sum(piece.n_rows for piece in pieces)
        out = np.empty((total - skip, self._spec.hidden_size), np.float32)
        missing: list[str] = []
        at = -skip  # where the piece begins in out
        for piece in pieces:
            first = max(0, -at)  # rows of the piece that are in the cache already
            at += piece.n_rows
            if first >= piece.n_rows:
                continue
            target = out[at - piece.n_rows + first : at]
            if isinstance(piece, Tokens):
                self._table.rows(piece.ids[first:], out=target)
                continue
            image = self._load_image(piece.key)
            if image is None:
                missing.append(piece.key)
                continue
            if image.shape != (piece.n_rows, self._spec.hidden_size):
                raise PromptError(
                    f"an image embedding has shape {image.shape}; {(piece.n_rows, self._spec.hidden_size)} is needed"
                )
            if not np.isfinite(image).all():
                raise PromptError(f"the image embedding {piece.key[:12]} holds values that are not finite")
            target[...] = image[first:]
        if missing:
            raise MissingEmbeddings(missing)
        return out

    def _feed(self, embeds: NDArray[np.float32], keys: list[RowKey]) -> NDArray[np.float32]:
        """Append rows to the KV cache; (vocab,) scores after the last of them."""
        past, n = len(self._held), len(embeds)
        try:
            result = self._request.infer(
                {
                    "inputs_embeds": embeds[None],
                    "attention_mask": np.ones((1, past + n), np.int64),
                    "position_ids": np.arange(past, past + n, dtype=np.int64)[None],
                    "beam_idx": np.zeros(1, np.int32),
                }
            )
            logits = np.array(result["logits"][0, -1], np.float32)
        except Exception as error:
            self._compile()
            raise EngineError(f"OpenVINO failed at row {past} ({' '.join(str(error).split())[:300]})") from None
        self._held += keys
        return logits

    def _rewind(self, n: int) -> None:
        """Cut the KV cache to its first n rows."""
        if n == len(self._held):
            return
        try:
            if n == 0:
                self._request.reset_state()
            else:
                for state in self._request.query_state():
                    state.state = ov.Tensor(state.state.data[:, :, :n, :].copy())
        except Exception as error:
            self._compile()
            raise EngineError(f"OpenVINO could not rewind to row {n} ({' '.join(str(error).split())[:300]})") from None
        del self._held[n:]

    def _compile(self) -> None:
        self._held = []
        self._request = self._core.compile_model(self._model, "CPU", self._properties).create_infer_request()


def row_keys(pieces: Sequence[Piece]) -> list[RowKey]:
    """What each row of a prompt is; two rows with equal keys after equal rows have equal KV entries.

    Raises PromptError for a piece without rows of the right kind.
    """
    keys: list[RowKey] = []
    for piece in pieces:
        if isinstance(piece, Tokens):
            keys += piece.ids
        elif isinstance(piece, ImageRows) and piece.n_rows >= 1:
            keys += [(piece.key, i) for i in range(piece.n_rows)]
        else:
            raise PromptError(f"{piece!r} is no piece of a prompt")
    return keys


def _common_prefix(a: Sequence[RowKey], b: Sequence[RowKey]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
