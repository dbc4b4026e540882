"""The pytest plugin: pytest -p mmchat.regress --mmchat-model DIR."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmchat.runtime import Runtime


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmchat")
    group.addoption(
        "--mmchat-model", metavar="DIR", default="demo", help='The model that mmchat_runtime runs. [default: "demo"]'
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        from mmchat.regress import strategies
    except ImportError as error:
        if error.name != "hypothesis":
            raise
        raise pytest.UsageError("mmchat.regress needs hypothesis: pip install hypothesis") from None
    strategies.use(config.getoption("--mmchat-model"))


@pytest.fixture(scope="session")
def mmchat_runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """The model of --mmchat-model, open for all tests, with a store of its own.  A crash costs its test alone."""
    import mmchat
    from mmchat.regress.talk import STORE_BYTES

    model = request.config.getoption("--mmchat-model")
    folder = tmp_path_factory.mktemp("mmchat-store")
    with mmchat.open(model, store=folder, store_cap_bytes=STORE_BYTES) as runtime:
        runtime.ready()
        yield runtime
