"""Text out of what RKLLM calls back: whole characters, whichever way the library cuts or joins them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmchat.embed_table import EmbedTable
from mmchat.engine import Sampling, Token, Tokens
from mmchat.model_dir import open_model
from mmchat.prompt import ChatTokenizer
from mmchat.rkllm_abi import FAMILIES
from mmchat.rkllm_answer import Answer
from mmchat.rkllm_embed import RkllmEngine
from mmchat.rkllm_model import Generated, RkllmModel
from tests.fakes import never
from tests.rkllm_standin.build import demo_model, library

SPEC = open_model("demo")
TOKENIZER = ChatTokenizer(SPEC.tokenizer_path)
WAYS = ("joined", "split", "waiting", "silent")


def called_back(ids: list[int], way: str) -> Iterator[Generated]:
    """What a library tells of these tokens; see RKLLM_STANDIN_UTF8."""
    pending = b""
    for token in ids:
        own = TOKENIZER.token_bytes(token)
        if way == "split":
            yield Generated(token, own)
        elif way == "waiting":
            yield Generated(token, b"" if n_open(own) else own)  # the text with the state WAITING is not looked at
        else:
            text = pending + own
            whole = text[: len(text) - n_open(text)]
            pending = text[len(whole) :]
            if whole or way == "joined":
                yield Generated(token, whole)


def n_open(text: bytes) -> int:
    """Bytes at its end that begin a character but do not complete it."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            return back if (4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1) > back else 0
    return 0


@given(text=st.text(st.sampled_from("aü文😀 ß"), min_size=1, max_size=12), way=st.sampled_from(WAYS))
def test_characters_come_whole(text: str, way: str) -> None:
    ids = TOKENIZER.encode(text)
    answer = Answer(TOKENIZER, Sampling(max_new_tokens=1000), (), ends_itself=True)
    shown = [answer.push(one) for one in called_back(ids, way)]
    assert "".join(filter(None, shown)) + answer.stream.finish() == text
    spelled = b"".join(map(TOKENIZER.token_bytes, answer.spelled()))
    assert spelled.decode() == text  # though not every token was told
    if way != "silent":
        assert answer.spelled() == tuple(ids)


def test_tokens_of_many_letters_may_be_held_back_whole() -> None:
    """Qwen2 has such: 10768 is two Cyrillic letters and half of one."""

    class Cyrillic:
        stop_ids: ClassVar[frozenset[int]] = frozenset()
        texts: ClassVar[list[bytes]] = ["ра".encode() + "з".encode()[:1], "з".encode()[1:]]

        def token_bytes(self, number: int) -> bytes:
            return self.texts[number]

    tokenizer: Any = Cyrillic()
    answer = Answer(tokenizer, Sampling(max_new_tokens=1000), (), ends_itself=True)
    shown = [answer.push(Generated(0, b"")), answer.push(Generated(1, "раз".encode()))]
    assert "".join(filter(None, shown)) == "раз"
    assert answer.spelled() == (0, 1)


@pytest.mark.parametrize("way", ["", "split", "waiting"])
@pytest.mark.parametrize("family", ["1.2.0", "1.3.0"])
def test_through_the_library_too(
    way: str, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tabulate: Any
) -> None:
    """Drawn at random, tokens are cut characters as often as not; the stand-in writes down which they were."""
    monkeypatch.setenv("RKLLM_STANDIN_TRACE", str(tmp_path / "trace"))
    if way:
        monkeypatch.setenv("RKLLM_STANDIN_UTF8", way)
    table = EmbedTable.open(SPEC.embed_table_path)
    sampling = Sampling(max_new_tokens=80, temperature=50.0)
    model = RkllmModel(
        library(family),
        FAMILIES[family],
        demo_model(),
        context_rows=332,
        hidden_size=table.width,
        n_tokens=table.n_ids,
        sampling=sampling,
    )
    engine = RkllmEngine(model, table, TOKENIZER, lambda key: None, context_rows=300)
    events = list(engine.generate([Tokens(tuple(range(40)))], sampling, never))
    model.close()
    tokens = json.loads((tmp_path / "trace").read_text().splitlines()[-2])["tokens"][:80]
    data = b"".join(map(TOKENIZER.token_bytes, tokens))
    assert sum(byte >= 0x80 for byte in data) > 2
    text = "".join(event.text for event in events if isinstance(event, Token)) + events[-1].text  # type: ignore[union-attr]
    assert text == codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    if family == "1.3.0" and way:
        what = {"split": "cuts characters", "waiting": "waits with characters"}[way]
        tabulate("RKLLM: faults of the library", fault=what, the_user_sees="right", kept="-")
