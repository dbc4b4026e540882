"""Three engines and the contract that all of them pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import Engine, Sampling, Tokens
from mmchat.llm_proc import LlmClient
from mmchat.model_dir import MAX_CACHES, open_model
from mmchat.openvino_engine import OpenVinoEngine
from mmchat.prompt import ChatTokenizer
from mmchat.store import Store
from tests.contract_engine import CONTEXT_ROWS, EngineContract, Kit, run
from tests.fakes import FakeEngine

SPEC = open_model("demo")


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(SPEC.tokenizer_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def in_process(tokenizer: ChatTokenizer, store: Store) -> Engine:
    checkpoint, table = Checkpoint(SPEC.folder), EmbedTable.open(SPEC.embed_table_path)
    return OpenVinoEngine(checkpoint, SPEC.llm, table, tokenizer, store.get, context_rows=CONTEXT_ROWS)


@pytest.fixture(scope="module")
def in_worker(store: Store) -> Iterator[Engine]:
    client = LlmClient(SPEC, store, context_rows=CONTEXT_ROWS)
    yield client
    client.worker.close()


def forgotten(engine: Engine) -> Engine:
    """Prompts that share no row with those of the tests fill all caches, at less cost than a new engine."""
    for number in range(MAX_CACHES):
        run(engine, [Tokens((500 + number,))], Sampling(max_new_tokens=1))
    return engine


class TestFake(EngineContract):
    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store) -> Kit:
        return Kit(lambda: FakeEngine(tokenizer, store, 8, context_rows=CONTEXT_ROWS), tokenizer, store, 8)


class TestOpenVino(EngineContract):
    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store, in_process: Engine) -> Kit:
        return Kit(lambda: forgotten(in_process), tokenizer, store, SPEC.llm.hidden_size)


class TestLlmClient(EngineContract):
    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store, in_worker: Engine) -> Kit:
        return Kit(lambda: forgotten(in_worker), tokenizer, store, SPEC.llm.hidden_size)
