"""The tokens of one answer as RKLLM calls them back, whatever the library thinks of their end."""

from __future__ import annotations

from collections.abc import Sequence

from mmchat.decoding import TextStream, ids_of_text
from mmchat.engine import Sampling, StopReason
from mmchat.errors import EngineError
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_model import SEE_LOG, Generated, Returned

# Of the tokens that a library may hold back until a character is whole; the longest of Qwen2's that end within one
# have some ten.
_TOLD_BYTES = 64


class Answer:
    """What was generated, what of it is shown, and why it ended."""

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
        self._told = (self._told + self._lost + own)[-_TOLD_BYTES:]
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
        returned.check()
        if not returned.finished and len(self.ids) == self.n_resumed:
            raise EngineError(f"rkllm_run came back with neither an answer nor an error; {SEE_LOG}")
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
