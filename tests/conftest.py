"""What every test shares: hypothesis profiles, the recorded reference, and folders of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("deep", settings.get_profile("quick"), max_examples=5_000)
settings.load_profile("quick")  # pytest's own --hypothesis-profile=deep comes later and wins


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, cache or history."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MMCHAT_STORE", str(home / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))


@pytest.fixture(scope="session")
def reference() -> Path:
    """Vectors recorded from the published code: in $MMCHAT_REFERENCE, or shared/reference beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("MMCHAT_REFERENCE") or default)
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"no recorded reference at {folder}, and CI=true demands it")
        pytest.skip(f"no recorded reference at {folder}: set MMCHAT_REFERENCE")
    return folder


_TABLES: pytest.StashKey[dict[str, list[dict[str, object]]]] = pytest.StashKey()


@pytest.fixture
def tabulate(request: pytest.FixtureRequest) -> Callable[..., None]:
    """tabulate(title, column=cell, ...): a row of a table that is printed after the tests."""
    tables = request.config.stash.setdefault(_TABLES, {})
    return lambda title, **cells: tables.setdefault(title, []).append(cells)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash.get(_TABLES, {}).items():
        terminalreporter.section(title)
        lines = [[name.replace("_", " ") for name in rows[0]], *([str(cell) for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line(text.rstrip())
