"""What every test shares: hypothesis profiles, the recorded reference, and folders of its own."""

from __future__ import annotations

import os
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
