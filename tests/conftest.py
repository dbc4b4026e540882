"""What every test shares: hypothesis profiles, the recorded reference, and folders of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("deep", settings.get_profile("quick"), max_examples=5_000)
settings.load_profile("quick")  # pytest's own --hypothesis-profile=deep comes later and wins

# A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, cache or history."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MMCHAT_STORE", str(home / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A red circle on blue."""
    return _circle(tmp_path / "red circle.png", "red", "blue")


@pytest.fixture
def green(tmp_path: Path) -> Path:
    """A green circle on white."""
    return _circle(tmp_path / "green.png", "green", "white")


def _circle(path: Path, color: str, background: str) -> Path:
    from tests.test_demo import picture

    picture("circle", color, background).save(path)
    return path


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


@pytest.fixture(scope="session")
def board_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its board folder with the stand-in library, written once; not to be changed."""
    from tests.rkllm_standin.__main__ import write_board_folder
    from tests.rkllm_standin.build import library

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            library(family)  # skips where there is no compiler
            made[family] = write_board_folder(tmp_path_factory.mktemp("board"), family)
        return made[family]

    return folder


@pytest.fixture
def board(board_folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """family ("1.3.0") -> a board folder of the test's own, with links to the large files; the same at every call."""

    def copy(family: str = "1.3.0") -> Path:
        target = tmp_path / f"board {family}"
        if not target.exists():
            target.mkdir()
            for path in board_folders(family).iterdir():
                (shutil.copy if path.suffix == ".json" else os.link)(path, target / path.name)
        return target

    return copy


@pytest.fixture(scope="session")
def board_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all boards: what one of them, or OpenVINO, encoded is there for the others: their encoder is the same."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def open_board(board: Callable[[str], Path], board_store: Path) -> Iterator[Callable[..., Any]]:
    """open_board(family, folder, **profile) -> its Runtime, with this in its profile; no worker is left behind."""
    import mmchat
    from mmchat.model_dir import open_model
    from mmchat.profile import Profile
    from tests.fakes import eventually, workers

    opened: list[Any] = []

    def open_(family: str = "1.3.0", folder: Path | None = None, **profile: Any) -> Any:
        folder = folder or board(family)
        if profile:
            Profile.open(open_model(folder), folder / "librkllmrt.so").update(**profile)
        opened.append(mmchat.open(folder, store=board_store, n_threads=1))
        return opened[-1]

    others = workers()
    yield open_
    for runtime in opened:
        runtime.close()
    eventually(lambda: workers() <= others)


@pytest.fixture(scope="session")
def openvino_talk(board_store: Path) -> tuple[list[tuple[int, ...]], int]:
    """The answers of tests.conversation on OpenVINO, and the rows that are new over it."""
    import mmchat
    from tests.conversation import talk

    with mmchat.open("demo", store=board_store, n_threads=1) as runtime:
        answers, _, n_new = talk(runtime)
    return answers, n_new


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
