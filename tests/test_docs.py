"""docs: every command in them runs, on the demo model and a hub of the tests' own.  README: its Python runs, and its
commands are what the command line takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mmchat.cli import app
from mmchat.model_dir import open_model
from tests.fake_hub import FakeHub
from tests.test_cli import mmchat_command, run_here
from tests.test_convert import sharded
from tests.test_demo import picture
from tests.toolkits import write_python

DOCS = Path(__file__).resolve().parents[1] / "docs"
PUBLISHED = "openbmb/MiniCPM-V-2_6"


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


README_COMMANDS = [
    line for block in blocks("../README.md", "sh") for line in block.splitlines() if line.startswith("mmchat ")
]


@pytest.mark.parametrize("line", README_COMMANDS)
def test_the_readmes_commands_are_taken(line: str) -> None:
    """Names of commands and options; nothing runs."""
    _, *words = shlex.split(re.sub(r"<\s*\S+", "", line), comments=True)
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context("mmchat", words)  # raises for what it does not know


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use, record, captions, saving = blocks("../README.md", "python")
    assert "rtsp://" in captions  # there is no camera here
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    picture("circle", "red", "blue").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMCHAT_STORE", str(tmp_path / "store"))
    rest = [
        record,
        "assert (len(chat.turns), len(other.turns), len(other.images)) == (1, 3, 2)\n",
        "assert [image.id for image in plan.images] == ['img1', 'img2', 'img3']\n",
        saving.replace("chat = rt.load", "chat.autosave(None); chat = rt.load"),
        "assert chat.saved_to.name == 'talk.mmchat'\n",
    ]
    names: dict[str, Any] = {}
    exec(use + "".join(textwrap.indent(block, "    ") for block in rest), names)
    assert "white" in names["reply"].text
    assert (tmp_path / "copy.mmchat").is_file()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run commands in, with pictures; the hub has the demo as the published model."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("nncf")
    checkpoint = sharded(tmp_path / "published", 2, head=False)  # with the demo's own answers
    hub = FakeHub({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    hub.repo = PUBLISHED
    place = tmp_path / "here"
    place.mkdir()
    picture("circle", "red", "blue").save(place / "picture.png")
    (place / "pictures").mkdir()
    for colour in ("red", "green"):
        picture("circle", colour, "blue").save(place / "pictures" / f"{colour}.png")
    for variable in ("MMCHAT_RKNN_PYTHON", "MMCHAT_RKLLM_PYTHON"):
        monkeypatch.setenv(variable, str(write_python(tmp_path / "python")))
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with hub:
        yield place


def run(page: str) -> None:
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "mmchat", line
            if words[0] in ("doctor", "convert"):
                code, _, err = run_here(*words)
                assert code == 0 or (words[0] == "doctor" and code == 1), err  # 1: this machine has a problem
            else:
                out, _ = mmchat_command(*words)
                assert words[0] != "ask" or "red" in out, line


@pytest.mark.timeout(900)  # many commands, and NNCF takes long to import
def test_every_command_for_a_pc_runs(here: Path) -> None:
    run("pc.md")
    assert open_model(here / "CHECKPOINT").llm.n_layers == open_model(here / "int4").llm.n_layers == 4


def test_every_command_for_a_board_runs_and_the_folder_opens(here: Path) -> None:
    """The one that convert board makes; and parts of a checkpoint with mmchat.json as the page shows it, filled in for
    the demo, and any file for the LLM."""
    run("board.md")
    made = {"CHECKPOINT", "board", "model.rkllm", "qwen2", "table.safetensors", "vision", "vision.rknn", "vision8.rknn"}
    assert made < set(os.listdir(here))
    assert open_model(here / "board").board is not None
    board = here / "parts"
    (board / "model.rkllm").write_bytes(b"an LLM")
    (text,) = blocks("board.md", "json")
    description = json.loads(text)
    description.update(hidden_size=192, context_rows=2048)
    for name, values in description["files"].items():
        content = (board / name).read_bytes()
        values.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (board / "mmchat.json").write_text(json.dumps(description))
    spec = open_model(board)
    assert spec.board is not None
    assert spec.board.stop_ids == {151643, 151645}
    assert spec.encoder_digest == open_model("demo").encoder_digest


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    code = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in (DOCS.parent / "mmchat").rglob("*.py")
    )
    code = re.sub(r"\{[^{}]*\}", "...", code)
    messages = re.findall(r"^\| `([^`]+)` \|", (DOCS / "pc.md").read_text(encoding="utf-8"), re.M)
    assert len(messages) > 5
    for message in messages:
        for part in re.split(r"[;,] |\.\.\.|'all'", message):
            assert part.strip() in code, message


def test_the_boards_messages_are_those_of_the_code() -> None:
    """Of the PC's part: the board's are Rockchip's."""
    code = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in (DOCS.parent / "mmchat").rglob("*.py")
    )
    page = (DOCS / "board.md").read_text(encoding="utf-8").split("## When something is wrong")[1]
    ours = re.findall(r"^\| `([^`]+)` \|", page.split("On the board,")[0], re.M)
    assert len(ours) > 6
    for message in ours:
        for part in message.split("..."):
            if "No module named" not in part:
                words = part.replace("has no working rknn-toolkit2 (", "has no working {toolkit.name} (").strip()
                assert words in code, message
