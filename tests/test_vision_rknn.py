"""convert vision-rknn: drives rknn-toolkit2 in a process of its own, and believes none of it.

The toolkit is a stand-in (tests/toolkits), and the real one where MMCHAT_RKNN_PYTHON names its Python.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from mmchat import outputs
from mmchat.convert import toolkit, vision_onnx, vision_rknn
from mmchat.convert.toolkit import RKNN
from mmchat.errors import DiskFull, ModelDirError, OptionError, ToolkitError
from mmchat.model_dir import open_model
from mmchat.rknn_file import read_rknn
from tests.test_cli import MMCHAT, mmchat_command, refused
from tests.test_convert import quiet
from tests.toolkits import write_python

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SPEC = open_model("demo")
RULES = vision_rknn.RULES


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few patches, for speed."""
    folder = tmp_path_factory.mktemp("onnx") / "v"
    vision_onnx.run(vision_onnx.plan(SPEC, 25), folder, quiet)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"  # with a blank, which the toolkit's list of samples does not take
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number, size in enumerate(((60, 60), (300, 90))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def build(onnx: Path, folder: Path, told: list[str] | None = None, **behaviour: Any) -> dict[str, Any]:
    """Into folder/v.rknn, with a toolkit that behaves like this."""
    python = write_python(folder / "python", **behaviour)
    plan = vision_rknn.plan(onnx, "rk3588")
    return vision_rknn.run(plan, folder / "v.rknn", python, (told if told is not None else []).append)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "python")


def test_a_model_and_its_report(onnx: Path, tmp_path: Path) -> None:
    told: list[str] = []
    report = build(onnx, tmp_path, told)
    assert left(tmp_path) == ["v.rknn", "v.rknn.json"]
    assert json.loads((tmp_path / "v.rknn.json").read_text()) == report
    (output,) = report["simulator_against_onnx"]
    assert output["name"] == "embeddings"
    assert 0.99999 < output["cosine"] < 1  # the stand-in's noise
    assert 1e-3 < output["max_error"] < 1e-2 < output["largest"]
    assert (report["target"], report["precision"], report["views"], report["disabled_rules"]) == (
        "rk3588",
        "float16",
        4,
        [],
    )
    assert read_rknn(tmp_path / "v.rknn").chips == ("rk3588",)
    steps = ["import", "onnxruntime", "load", "build", "export", "simulator"]
    assert told == [f"rknn-toolkit2: {step}" for step in steps]


def test_the_command(onnx: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8, calibrated with pictures in a folder with a blank; names relative; the Python from the environment."""
    env = {"MMCHAT_RKNN_PYTHON": str(write_python(tmp_path / "python"))}
    words = ("convert", "vision-rknn", onnx, Path("o u t") / "v.rknn", "--target", "rk3576")
    monkeypatch.chdir(tmp_path)
    out, _ = mmchat_command(*words, "--dry-run", "--json", env=env)
    assert json.loads(out)["memory"] > 500_000_000
    assert not (tmp_path / "o u t").exists()
    out, err = mmchat_command(*words, "--int8", "--pictures", pictures, env=env)
    assert out == "o u t/v.rknn\n"
    assert "rknn-toolkit2: simulator" in err
    report = json.loads((tmp_path / "o u t" / "v.rknn.json").read_text())
    assert (report["precision"], report["views"]) == ("int8", 2)


def test_a_rule_that_fails_is_switched_off(onnx: Path, tmp_path: Path) -> None:
    """Those that are known to, at once; another, by its name in the log."""
    told: list[str] = []
    report = build(onnx, tmp_path, told, rules=[RULES[1], "fuse_of_the_next_release"])
    assert report["disabled_rules"] == [*RULES, "fuse_of_the_next_release"]
    assert sum("again without" in line for line in told) == 2


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"load_onnx": -1}, r"load_onnx failed \(returned -1\); it said: E load_onnx: the model is not to its liking"),
        ({"signal": "SIGABRT"}, "aborted, as it does on graphs that it cannot compile at the step 'build'"),
        ({"signal": "SIGKILL"}, "was killed: most likely there was not enough memory"),
        ({"signal": "SIGSEGV"}, "crashed (SIGSEGV) at the step 'build'"),
        ({"rules": ["fuse_a", "fuse_b", "fuse_c"]}, "build failed"),
        ({"inference": "none"}, "inference failed (gave None outputs of 1)"),
        ({"inference": "nan"}, "not finite"),
        ({"noise": 0.5}, "cosine 0.9"),
        ({"chip": "rk3566"}, r"was made for ('rk3566',)"),
    ],
)
def test_what_goes_wrong_is_told_and_nothing_written(
    onnx: Path, tmp_path: Path, behaviour: dict[str, Any], said: str
) -> None:
    with pytest.raises(ToolkitError) as raised:
        build(onnx, tmp_path, **behaviour)
    assert said.replace("\\", "") in str(raised.value)
    assert left(tmp_path) == ["v.rknn.log"]  # all that it said


def test_what_a_toolkit_leaves_running_does_not_keep_it_waiting(onnx: Path, tmp_path: Path) -> None:
    """A process that it forked holds the pipe open, and it was killed before it said a word."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600 &\nkill -9 $$\n")
    python.chmod(0o755)
    with pytest.raises(ToolkitError, match="was killed: most likely there was not enough memory"):
        vision_rknn.run(vision_rknn.plan(onnx, "rk3588"), tmp_path / "v.rknn", python, print)


@pytest.mark.parametrize("target", [".", "v.onnx", "/"])
def test_a_target_that_is_no_such_file(onnx: Path, target: str) -> None:
    with pytest.raises(ModelDirError, match=r"give the file to write, for example .*v.*\.rknn"):
        vision_rknn.run(vision_rknn.plan(onnx, "rk3588"), Path(target), Path(sys.executable), print)


def test_less_is_accepted_where_that_is_asked_for(onnx: Path, tmp_path: Path) -> None:
    python = write_python(tmp_path / "python", noise=0.5)
    report = vision_rknn.run(vision_rknn.plan(onnx, "rk3588", min_cosine=0.5), tmp_path / "v.rknn", python, print)
    assert 0.5 < report["simulator_against_onnx"][0]["cosine"] < 0.999


def test_without_the_toolkit_it_says_how_to_get_it(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RKNN.variable, raising=False)
    words = ("convert", "vision-rknn", onnx, tmp_path / "v.rknn", "--target", "rk3588")
    with pytest.raises(ToolkitError, match=r"--python or \$MMCHAT_RKNN_PYTHON; docs/board.md"):
        RKNN.python()
    with pytest.raises(ToolkitError, match="/no/python: no such Python"):
        RKNN.python("/no/python")
    plan = vision_rknn.plan(onnx, "rk3588")
    with pytest.raises(ToolkitError, match="has no working rknn-toolkit2"):
        vision_rknn.run(plan, tmp_path / "v.rknn", Path(sys.executable), print)
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(ToolkitError, match="cannot be run"):
        vision_rknn.run(plan, tmp_path / "v.rknn", tmp_path / "text", print)
    assert "rk3566" in refused(*words[:-1], "rk3566", code=2)


def test_what_is_no_encoder_of_ours_is_refused(onnx: Path, tmp_path: Path, pictures: Path) -> None:
    import onnx as package

    with pytest.raises(ModelDirError, match="make it with mmchat convert vision-onnx"):
        vision_rknn.plan(tmp_path, "rk3588")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ModelDirError, match="not an ONNX model"):
        vision_rknn.plan(tmp_path / "x.onnx", "rk3588")
    model = package.load(onnx / "vision.onnx", load_external_data=False)
    package.save(model, tmp_path / "alone.onnx")
    with pytest.raises(ModelDirError, match=r"lacks vision.onnx.data, vision_positions.safetensors"):
        vision_rknn.plan(tmp_path / "alone.onnx", "rk3588")
    del model.graph.input[0]
    package.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelDirError, match="its inputs and outputs are position_rows"):
        vision_rknn.plan(tmp_path / "other.onnx", "rk3588")
    with pytest.raises(OptionError, match="int8 is calibrated with pictures"):
        vision_rknn.plan(onnx, "rk3588", int8=True)
    with pytest.raises(ModelDirError, match="has no pictures"):
        vision_rknn.plan(onnx, "rk3588", pictures=onnx)
    with pytest.raises(ModelDirError, match=r"for example .*x\.rknn"):
        vision_rknn.run(vision_rknn.plan(onnx, "rk3588"), tmp_path / "x.onnx", Path("python"), print)


def test_a_full_disk_is_told_before_it_happens(onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 50_100_000)
    with pytest.raises(DiskFull, match="make room"):
        build(onnx, tmp_path)
    assert left(tmp_path) == []


def alive(word: str) -> bool:
    """Whether a process with this word in its command line runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                return True
        except OSError:
            pass
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_toolkit_ends_with_its_command(onnx: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Killed or interrupted while it builds; the next run begins anew, and leaves nothing of the last one."""
    python = write_python(tmp_path / "python", sleep=600)
    target = tmp_path / "v.rknn"
    command = [*MMCHAT, "convert", "vision-rknn", str(onnx), str(target), "--target", "rk3588", "--python", str(python)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        while "build" not in process.stderr.readline():
            pass
        assert alive(str(tmp_path / ".v.rknn.work"))
        process.send_signal(how)
        assert process.wait(timeout=120) == (-9 if how == signal.SIGKILL else 130)
    deadline = time.monotonic() + 60
    while alive(str(tmp_path / ".v.rknn.work")):
        assert time.monotonic() < deadline, "the toolkit outlives its command"
        time.sleep(0.05)
    assert not target.exists()
    if how == signal.SIGKILL:
        build(onnx, tmp_path)
        assert left(tmp_path) == ["v.rknn", "v.rknn.json"]


def test_the_driver_is_a_program_of_its_own() -> None:
    """It runs where there is no mmchat."""
    text = Path(toolkit.__file__).with_name("toolkit_driver.py").read_text()
    assert "import mmchat" not in text
    assert "from mmchat" not in text


@pytest.mark.skipif(
    not os.environ.get(RKNN.variable) or settings().max_examples < 1000,
    reason=f"needs rknn-toolkit2 ({RKNN.variable}) and --hypothesis-profile=deep",
)
@pytest.mark.parametrize("target", vision_rknn.TARGETS)
def test_the_real_toolkit_agrees_with_the_onnx(tmp_path: Path, target: str) -> None:
    """At cosine >= 0.999, as run() demands; and the file tells of what the board is to feed."""
    vision_onnx.run(vision_onnx.plan(SPEC), tmp_path / "v", quiet)
    plan = vision_rknn.plan(tmp_path / "v", target)
    report = vision_rknn.run(plan, tmp_path / "v.rknn", RKNN.python(), print)
    assert report["toolkit"] != "unknown"
    assert report["simulator_against_onnx"][0]["cosine"] >= 0.999
    file = read_rknn(tmp_path / "v.rknn")
    assert file.chips == (target,)
    assert [shape for _, shape in file.inputs] == [(1, 80, 588), (1, 80, 160), (1, 1, 80), (1, 80, 192)]
