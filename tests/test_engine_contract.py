"""Three engines and the contract that all of them pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmchat.checkpoint import Checkpoint
from mmchat.embed_table import EmbedTable
from mmchat.engine import Engine, Sampling, Tokens
from mmchat.llm_proc import LlmClient
from mmchat.model_dir import open_model
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
def client(store: Store) -> Iterator[LlmClient]:
    client = LlmClient(SPEC, store, context_rows=CONTEXT_ROWS)
    yield client
    client.worker.close()


class TestFake(EngineContract):
    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store) -> Kit:
        def fresh() -> Engine:
            return FakeEngine(tokenizer, store, 8, context_rows=CONTEXT_ROWS)

        return Kit(fresh, tokenizer, store, 8)


class TestOpenVino(EngineContract):
    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store) -> Kit:
        checkpoint, table = Checkpoint(SPEC.folder), EmbedTable.open(SPEC.embed_table_path)

        def fresh() -> Engine:
            return OpenVinoEngine(checkpoint, SPEC.llm, table, tokenizer, store.get, context_rows=CONTEXT_ROWS)

        return Kit(fresh, tokenizer, store, SPEC.llm.hidden_size)


class TestLlmClient(EngineContract):
    """The engine in its worker.  To make it fresh, a prompt that shares no row with others empties its cache."""

    @pytest.fixture
    def kit(self, tokenizer: ChatTokenizer, store: Store, client: LlmClient) -> Kit:
        def fresh() -> Engine:
            run(client, [Tokens((500,))], Sampling(max_new_tokens=1))
            return client

        return Kit(fresh, tokenizer, store, SPEC.llm.hidden_size)
