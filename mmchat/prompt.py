"""Conversations -> pieces: the only module that knows MiniCPM-V-2.6's template.

Qwen2 ChatML; a message's parts are joined by one newline; an image is
`<image_id>i</image_id><image>` rows `</image>`, then per grid row `<slice>` rows `</slice>` for each cell, grid
rows joined by a newline.  Ids count images over the whole conversation from 0.  Source: the published processor and
chat template (transformers 4.40.0); tests/test_prompt.py holds its exact ids.

On purpose different: text is never searched for special tokens, so `<image>` or `<|im_end|>` typed by a user is
plain text, and a prompt that is too long is refused, where the reference cuts off its end.

This module knows no pixels and no engine; it does not know what a KV cache holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmchat.engine import ImageRows, Piece, Tokens
from mmchat.errors import ContextFull, ModelDirError, PromptError
from mmchat.slicing import Size, SlicePlan, plan_slices

# Number of the template, for saved conversations: raise it when the same turns give other rows.
FORMAT = 1
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
# The same for other programs, of conversations whose pictures are in the text already (Jinja, as Qwen2 has it).
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = (
    "<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>",
)  # fmt: skip

# Texts whose tokens are remembered, and how long one may be: at most some 40 MB, a few 100 KB as a rule.
_KNOWN_TEXTS, _KNOWN_CHARS = 1024, 1000
_KNOWN_MESSAGES = 4096  # whose rows a RowCounter remembers


class ChatTokenizer:
    """A tokenizer.json whose special tokens are reachable by name only, never through text."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelDirError: missing or damaged file, or a special token of MiniCPM-V is not in it."""
        from tokenizers import Tokenizer

        try:
            data = Path(path).read_bytes()
            self._tokenizer = Tokenizer.from_str(data.decode())
        except OSError as error:
            raise ModelDirError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:  # the library raises bare Exception
            raise ModelDirError(f"{path}: not a tokenizer.json ({error})") from None
        self._tokenizer.encode_special_tokens = True  # i.e. encode them as the text they are
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._known = lru_cache(maxsize=_KNOWN_TEXTS)(self._encode)
        self.special: dict[str, int] = {}
        for name in _SPECIAL:
            number = self._tokenizer.token_to_id(name)
            if number is None:
                raise ModelDirError(f"{path}: has no token {name}; this is not a MiniCPM-V-2.6 tokenizer")
            self.special[name] = number
        self.digest = hashlib.sha256(data).hexdigest()
        self._special_ids = {
            number: token.content.encode()
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset((self.special["<|im_end|>"], self.special["<|endoftext|>"]))

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that no text is ever encoded to."""
        return frozenset(self._special_ids)

    @property
    def n_ids(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text.  Raises PromptError for text that is not valid Unicode (lone surrogates)."""
        # Every turn sends the whole conversation, so the same texts come again and again.
        return list(self._known(text) if len(text) <= _KNOWN_CHARS else self._encode(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeError, TypeError):
            raise PromptError("the text holds a character that is not valid Unicode (a lone surrogate)") from None

    def token_bytes(self, number: int) -> bytes:
        """The UTF-8 bytes that a token stands for; they may begin or end within a character."""
        if number in self._special_ids:
            return self._special_ids[number]
        token = self._tokenizer.id_to_token(number)
        if token is None:  # tables may be padded beyond the tokenizer
            return b""
        return bytes(_BYTE_OF_CHAR[char] for char in token)


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the rest as U+0100, U+0101, ... in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))})
    return table


_BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image part: how it is cut, and the store key of each encoder input (None: only its size is known)."""

    plan: SlicePlan
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Message:
    """role: "system", "user" or "assistant".  ids: an answer's own tokens, used instead of parts."""

    role: str
    parts: tuple[Text | Picture, ...] = ()
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """pieces: what an engine takes.  ids: every row's token, `<unk>` where image rows go.

    image_spans: [start, end) in ids of each encoder input's rows, in the encoder's order.
    """

    pieces: tuple[Piece, ...]
    ids: list[int] = field(repr=False)
    image_spans: list[tuple[int, int]] = field(repr=False)

    @property
    def n_rows(self) -> int:
        return len(self.ids)

    @property
    def n_vision_inputs(self) -> int:
        return len(self.image_spans)


def render(
    messages: Iterable[Message],
    tokenizer: ChatTokenizer,
    *,
    query_num: int,
    use_image_id: bool = True,
    generation_prompt: bool = True,
) -> Prompt:
    """The prompt of a conversation: a default system message first where there is none, the assistant's header last.

    query_num: rows per encoder input.

    Raises PromptError: no message, a role that is none, or the first one is not from the system or the user.
    """
    messages = list(messages)
    if not messages:
        raise PromptError("the conversation is empty")
    if messages[0].role not in ("system", "user"):
        raise PromptError(f"the first message is from {messages[0].role!r}; it must be from the user")
    if messages[0].role != "system":
        messages.insert(0, Message("system", (Text(DEFAULT_SYSTEM_PROMPT),)))
    out = _Assembler(tokenizer, query_num)
    n_images = 0
    for index, message in enumerate(messages):
        if message.role not in ("user", "assistant") and not (message.role == "system" and index == 0):
            raise PromptError(f"message {index} has the role {message.role!r}; 'user' and 'assistant' are known")
        n_images = out.message(message, n_images, use_image_id=use_image_id)
    if generation_prompt:
        out.header("assistant")
    return out.finish()


def build(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: ChatTokenizer | str | Path,
    *,
    sizes: Sequence[Size] = (),
    system_prompt: str | None = None,
    use_image_id: bool | None = None,
    max_slice_nums: int | None = None,
    query_num: int = 64,
    scale_resolution: int = 448,
    patch_size: int = 14,
    max_patches: int | None = None,
    max_rows: int | None = None,
) -> Prompt:
    """The prompt of a conversation whose images are given by size alone: nothing is opened, no engine is needed.

    messages: {"role", "content"}; content is text or a list of {"type": "text", "text"} and
        {"type": "image", "size": [width, height]}; an image without a size takes the next of sizes.
    None stands for the model's default: its system prompt, image ids on, 9 slices.  The other values are
    MiniCPM-V-2.6's.
    max_rows: a longer prompt is refused (the reference cuts off its end at 8192); None: no limit.

    Raises PromptError naming the message and part that is wrong; ImageError for impossible sizes; ContextFull.
    """
    if not isinstance(tokenizer, ChatTokenizer):
        tokenizer = ChatTokenizer(tokenizer)
    for name, value, kind in (
        ("system_prompt", system_prompt, str),
        ("use_image_id", use_image_id, bool),
        ("max_slice_nums", max_slice_nums, int),
    ):
        if value is not None and type(value) is not kind:
            raise PromptError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    if max_slice_nums is None:
        max_slice_nums = 9
    remaining = iter(sizes)

    def plan(size: Size) -> SlicePlan:
        return plan_slices(
            *size,
            max_slice_nums=max_slice_nums,
            scale_resolution=scale_resolution,
            patch_size=patch_size,
            max_patches=max_patches,
        )

    plan((1, 1))  # refuses an impossible max_slice_nums, pictures or not
    parsed = [_message(message, f"message {i}", remaining, plan) for i, message in enumerate(messages)]
    if system_prompt:
        if parsed and parsed[0].role == "system":
            raise PromptError("a system message and a system_prompt are both given; give one")
        parsed.insert(0, Message("system", (Text(system_prompt),)))
    if next(remaining, None) is not None:
        raise PromptError("more sizes are given than the messages have images without one")
    prompt = render(parsed, tokenizer, query_num=query_num, use_image_id=use_image_id is not False)
    if max_rows is not None and prompt.n_rows > max_rows:
        raise ContextFull(prompt.n_rows, 0, max_rows)
    return prompt


def _message(message: Any, where: str, sizes: Any, plan: Callable[[Size], SlicePlan]) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f'{where}: must be an object with "role" and "content"')
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PromptError(f"{where}: its content must be a text or a list of parts, not {type(content).__name__}")
    parts: list[Text | Picture] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(Text(part["text"]))
        elif kind == "image":
            size = part["size"] if part.get("size") is not None else next(sizes, None)
            if not isinstance(size, (list, tuple)) or [type(n) for n in size] != [int, int]:
                raise PromptError(f'{where}, part {number}: an image needs "size": [width, height], not {size!r}')
            parts.append(Picture(plan((size[0], size[1]))))
        else:
            raise PromptError(
                f'{where}, part {number}: {part!r} is no {{"type": "text", "text"}} or {{"type": "image", "size"}}'
            )
    return Message(message["role"], tuple(parts))


class _Assembler:
    """Collects text until something that is no text comes, for the tokenizer must see it whole."""

    def __init__(self, tokenizer: ChatTokenizer, query_num: int) -> None:
        self._tokenizer, self._query_num = tokenizer, query_num
        self._text: list[str] = []
        self._run: list[int] = []
        self._pieces: list[Piece] = []
        self._ids: list[int] = []
        self._spans: list[tuple[int, int]] = []

    def text(self, text: str) -> None:
        if text:
            self._text.append(text)

    def tokens(self, ids: Iterable[int]) -> None:
        if self._text:
            text = "".join(self._text)
            self._text.clear()
            self._run += self._tokenizer.encode(text)
        self._run += ids

    def special(self, name: str) -> None:
        self.tokens((self._tokenizer.special[name],))

    def header(self, role: str) -> None:
        self.special("<|im_start|>")
        self.text(f"{role}\n")

    def message(self, message: Message, n_images: int, *, use_image_id: bool) -> int:
        """n_images: pictures before it; returns those up to its end."""
        self.header(message.role)
        if message.ids is not None:
            self.tokens(message.ids)
        else:
            for number, part in enumerate(message.parts):
                self.text("\n" if number else "")
                if isinstance(part, Text):
                    self.text(part.text)
                else:
                    self.picture(part, n_images if use_image_id else None)
                    n_images += 1
        self.special("<|im_end|>")
        self.text("\n")
        return n_images

    def picture(self, picture: Picture, image_id: int | None) -> None:
        plan = picture.plan
        if image_id is not None:
            self.special("<image_id>")
            self.text(str(image_id))
            self.special("</image_id>")
        keys = iter(picture.keys or [""] * plan.n_inputs)
        self._view("<image>", "</image>", next(keys))
        columns, rows = plan.grid or (0, 0)
        for row in range(rows):
            self.text("\n" if row else "")
            for _ in range(columns):
                self._view("<slice>", "</slice>", next(keys))

    def _view(self, begin: str, end: str, key: str) -> None:
        self.special(begin)
        self._flush()
        start = len(self._ids)
        self._ids += [self._tokenizer.special["<unk>"]] * self._query_num
        self._spans.append((start, len(self._ids)))
        self._pieces.append(ImageRows(key, self._query_num))
        self.special(end)

    def _flush(self) -> None:
        self.tokens(())
        if self._run:
            self._pieces.append(Tokens(tuple(self._run)))
            self._ids += self._run
            self._run = []

    def finish(self) -> Prompt:
        self._flush()
        return Prompt(tuple(self._pieces), self._ids, self._spans)


class RowCounter:
    """Counts rows without laying them out.  Rows of messages add up: a message begins with a special token."""

    def __init__(self, tokenizer: ChatTokenizer, *, query_num: int, use_image_id: bool = True) -> None:
        self._tokenizer, self._query_num, self._use_image_id = tokenizer, query_num, use_image_id
        self._known: dict[Any, int] = {}
        out = _Assembler(tokenizer, query_num)
        out.header("assistant")
        self.header = out.finish().n_rows  # of the answer to come

    def message(self, message: Message, n_images: int = 0) -> int:
        """n_images: pictures before it in the conversation."""
        if message.ids is not None:
            return self.message(Message(message.role)) + len(message.ids)
        parts = tuple(part.plan if isinstance(part, Picture) else _short(part.text) for part in message.parts)
        key = message.role, parts, n_images
        if key not in self._known:
            if len(self._known) >= _KNOWN_MESSAGES:
                del self._known[next(iter(self._known))]
            out = _Assembler(self._tokenizer, self._query_num)
            out.message(message, n_images, use_image_id=self._use_image_id)
            self._known[key] = out.finish().n_rows
        return self._known[key]


def _short(text: str) -> str | bytes:
    """The text, or where it is long something that stands for it."""
    return text if len(text) <= 200 else hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def picture_rows(plan: SlicePlan, tokenizer: ChatTokenizer, query_num: int, image_id: int | None = 0) -> int:
    """Rows of the prompt that one picture takes, tags included."""
    out = _Assembler(tokenizer, query_num)
    out.picture(Picture(plan), image_id)
    return out.finish().n_rows
