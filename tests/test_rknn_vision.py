"""The NPU's encoder on the stand-in for Lite2 (tests/rknn_standin): its numbers, its faults, one NPU for two.

No board was at hand, and no librknnrt.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import mmchat
from mmchat import vision_proc
from mmchat.checkpoint import Checkpoint
from mmchat.errors import EngineError, WorkerDied, WorkerTimeout
from mmchat.llm_proc import Rkllm
from mmchat.model_dir import ModelSpec, open_model
from mmchat.openvino_vision import OpenVinoEncoder
from mmchat.profile import Profile
from mmchat.runtime import Runtime
from mmchat.store import Store, slice_key
from mmchat.vision_proc import VisionClient
from tests.conversation import GREEDY, TURNS, picture
from tests.fakes import eventually
from tests.rkllm_standin.__main__ import LIBRARY, N_PATCHES, write_board_folder
from tests.rkllm_standin.build import library
from tests.rknn_standin.model import LITE2

DEMO = open_model("demo")
PATCH = DEMO.vision.patch_size
ACCURATE: dict[str, object] = {"EXECUTION_MODE_HINT": "ACCURACY"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """vision.mode -> its board folder, written once."""
    made: dict[str, Path] = {}

    def folder(mode: str) -> Path:
        if mode not in made:
            library("1.3.0")  # skips where there is no compiler
            made[mode] = write_board_folder(tmp_path_factory.mktemp(mode), "1.3.0", vision=mode)
        return made[mode]

    return folder


@pytest.fixture
def navit(folders: Callable[[str], Path]) -> ModelSpec:
    return open_model(folders("navit"))


@pytest.fixture(scope="module")
def openvino() -> OpenVinoEncoder:
    return OpenVinoEncoder(Checkpoint(DEMO.folder), DEMO.vision, ACCURATE)


@pytest.fixture(autouse=True)
def lite2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The workers, and this process, find the stand-in; afterwards this one has never seen it."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(LITE2))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "rknnlite"]:
        del sys.modules[name]


@pytest.fixture
def client(navit: ModelSpec, tmp_path: Path) -> Iterator[Callable[..., VisionClient]]:
    """Clients on stores of their own; afterwards none of their processes is left."""
    made: list[VisionClient] = []
    before = children()

    def open_(spec: ModelSpec = navit, **options: Any) -> VisionClient:
        made.append(VisionClient(spec, Store(tmp_path / f"store {len(made)}"), **options))
        return made[-1]

    yield open_
    for one in made:
        one.worker.close()
    eventually(lambda: children() <= before)


def children() -> set[str]:
    """Process ids of this process's children."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return set(" ".join(lists).split())


def pixels(columns: int, rows: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows * PATCH, columns * PATCH, 3), np.uint8)


def keyed(spec: ModelSpec, parts: list[NDArray[np.uint8]]) -> list[tuple[str, NDArray[np.uint8]]]:
    return [(slice_key(part, spec.encoder_digest), part) for part in parts]


def encoded(client: VisionClient, spec: ModelSpec, parts: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """What the store has after encoding."""
    wanted = keyed(spec, parts)
    assert client.encode(wanted).n_slices == len(parts)
    store = Store(**client.worker._config["store"])
    kept = [store.get(key) for key, _ in wanted]
    return [rows for rows in kept if rows is not None]


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The largest, of the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


# Numbers

SHAPES = [(8, 8), (1, 1), (1, 60), (N_PATCHES, 1), (5, 12), (25, 2), (10, 8)]


def test_navit_embeds_as_openvino_does(client: Any, navit: ModelSpec, openvino: OpenVinoEncoder) -> None:
    parts = [pixels(columns, rows, i) for i, (columns, rows) in enumerate(SHAPES)]
    kept = encoded(client(), navit, parts)
    worst = max(difference(rows, openvino.encode(part)) for rows, part in zip(kept, parts, strict=True))
    print(f"navit on the stand-in and OpenVINO: {worst:.1e} apart, of the largest value, over {len(parts)} shapes")
    assert worst < 1e-5


def test_square_scales_every_slice_to_its_side(
    client: Any, folders: Callable[[str], Path], openvino: OpenVinoEncoder
) -> None:
    spec = open_model(folders("square"))
    side = spec.slices.scale_resolution
    assert spec.board
    assert spec.board.rknn
    assert spec.board.rknn.side == side == 112
    parts = [pixels(8, 8), pixels(5, 12), pixels(16, 3), pixels(1, 1)]
    for rows, part in zip(encoded(client(spec), spec, parts), parts, strict=True):
        square = np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.BICUBIC))
        assert difference(rows, openvino.encode(square)) < 1e-5


def test_a_slice_again_gives_the_same_bytes(client: Any, navit: ModelSpec) -> None:
    parts = [pixels(*shape) for shape in SHAPES[:4]]
    first, again = encoded(client(), navit, parts), encoded(client(), navit, parts[::-1])
    assert [rows.tobytes() for rows in first] == [rows.tobytes() for rows in again[::-1]]


def test_no_call_leaves_its_buffers(navit: ModelSpec) -> None:
    from mmchat.rknn_vision import RknnEncoder

    assert navit.board
    encoder = RknnEncoder(navit.board, navit.vision)
    gc.disable()
    try:
        for seed in range(3):
            encoder.encode(pixels(2, 2, seed))
        assert not [one for one in gc.get_objects() if type(one).__name__ == "_Call"]
    finally:
        gc.enable()


def test_what_lite2_is_told(client: Any, navit: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKNN_STANDIN_TRACE", str(tmp_path / "trace"))
    encoded(client(), navit, [pixels(8, 8), pixels(3, 2)])
    init, *runs = traced(tmp_path / "trace")
    assert init["core_mask"] == 7  # NPU_CORE_0_1_2
    n, vision = N_PATCHES, navit.vision
    assert [run["shapes"] for run in runs] == [
        [[1, n, 588], [1, n, vision.hidden_size], [1, 1, n], [1, n, vision.output_size]]
    ] * 2


def traced(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_progress_and_cancel_between_slices(client: Any, navit: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKNN_STANDIN_ENCODE_MS", "50")
    one, seen = client(), list[tuple[int, int]]()
    wanted = keyed(navit, [pixels(2, 2, seed) for seed in range(40)])
    done = one.encode(wanted, lambda *progress: seen.append(progress), lambda: len(seen) >= 2)
    assert seen == [(i + 1, 40) for i in range(done.n_slices)]
    assert 2 <= done.n_slices < 40
    pid = one.worker.pid
    assert one.encode(wanted[-2:]).n_slices == 2
    assert one.worker.pid == pid


def test_a_slice_too_long_for_the_encoder_is_shrunk_and_that_is_said(
    navit: ModelSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (4000, 20), "red").save(tmp_path / "ribbon.png")
    with mmchat.open(navit.folder, store=tmp_path / "store", n_threads=1) as runtime:
        session = runtime.session()
        with caplog.at_level(logging.WARNING):
            assert session.ask("What colour is it?", tmp_path / "ribbon.png", **GREEDY).text
        assert f"ribbon.png: too long for the encoder's {N_PATCHES} patches, so views are shrunk" in caplog.text
        (image,) = session.images
        assert image.plan.shrunk
        assert all((w // PATCH) * (h // PATCH) <= N_PATCHES for w, h in image.plan.input_sizes)


# Faults: (switches, what encoding two slices gives); the worker is well again afterwards.
FAULTS: dict[str, tuple[dict[str, str], Any]] = {
    "crashes once": ({"CRASH": "1"}, "right, 1 restart"),
    "crashes always": ({"CRASH": "1+"}, (WorkerDied, "SIGSEGV")),
    "hangs once": ({"HANG": "2"}, "right, 1 restart"),
    "hangs always": ({"HANG": "1+"}, (WorkerTimeout, "silent for 10 s")),
    "fails a run, unnoticed": ({"RUN": "2"}, "right, 1 restart"),
    "fails every run, unnoticed": ({"RUN": "1+"}, (EngineError, "the NPU gave no result")),
    "gives no result once": ({"NONE": "2"}, "right, 1 restart"),
    "gives no result": ({"NONE": "1+"}, (EngineError, r"the NPU gave no result .*/rknn\.log has its own words")),
    "gives no outputs": ({"NOTHING": "1+"}, (EngineError, "vision.rknn gave nothing")),
    "gives another shape": ({"SHAPE": "1+"}, (EngineError, r"vision.rknn gave float32 \(1, 15, 192\); floats of")),
    "gives integers": ({"INTEGERS": "1+"}, (EngineError, "vision.rknn gave int8")),
    "gives NaN once": ({"NAN": "1"}, "right, 1 restart"),
    "gives NaN": ({"NAN": "2+"}, (EngineError, "values that are not finite")),
    "gives infinity": ({"INFINITE": "1+"}, (EngineError, "values that are not finite")),
    "is not read": ({"LOAD": "fail"}, (EngineError, "load_rknn returned -1")),
    "is not initialised once": ({"INIT_FAIL": "1"}, "right, 1 restart"),
    "is not initialised": ({"INIT_FAIL": "1+"}, (EngineError, "init_runtime returned -1 for vision.rknn: no NPU")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_a_right_answer_or_one_clear_error(
    fault: str,
    client: Any,
    navit: ModelSpec,
    openvino: OpenVinoEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches, expected = FAULTS[fault]
    monkeypatch.setattr(vision_proc, "NPU_SILENCE_S", 10.0)
    monkeypatch.setenv("RKNN_STANDIN_COUNT", str(tmp_path / "count"))
    parts = [pixels(3, 2), pixels(2, 3)]
    one = client(log_file=tmp_path / "rknn.log")
    with monkeypatch.context() as patch:
        for name, value in switches.items():
            patch.setenv(f"RKNN_STANDIN_{name}", value)
        started = time.monotonic()
        try:
            restarts = one.encode(keyed(navit, parts)).restarts
            saw: Any = f"right, {restarts} restart"
        except EngineError as error:
            saw = error
        took = time.monotonic() - started
    print(f"{fault:24} {took:4.1f} s  {saw if isinstance(saw, str) else f'{type(saw).__name__}: {saw}'}")
    assert took < 120
    if isinstance(expected, str):
        assert saw == expected
    else:
        assert type(saw) is expected[0]
        with pytest.raises(expected[0], match=expected[1]):
            raise saw
    for rows, part in zip(encoded(one, navit, parts), parts, strict=True):
        assert difference(rows, openvino.encode(part)) < 1e-5
    assert "rknn-toolkit-lite2 version" in (tmp_path / "rknn.log").read_text()


def test_without_lite2(client: Any, navit: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(LITE2)])
    with pytest.raises(EngineError, match=r"rknn-toolkit-lite2 cannot be imported .*: pip install"):
        client().encode(keyed(navit, [pixels(1, 1)]))


def test_cores_that_this_lite2_does_not_have(navit: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from rknnlite.api import RKNNLite

    from mmchat.rknn_vision import RknnEncoder

    monkeypatch.delattr(RKNNLite, "NPU_CORE_0_1_2")
    assert navit.board
    with pytest.raises(EngineError, match=r"has no NPU_CORE_0_1_2: choose other vision\.cores"):
        RknnEncoder(navit.board, navit.vision)


def test_a_lite2_that_raises(navit: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from rknnlite.api import RKNNLite

    from mmchat.rknn_vision import RknnEncoder

    def raises(*arguments: object, **named: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'format'")  # as on a PC

    monkeypatch.setattr(RKNNLite, "init_runtime", raises)
    assert navit.board
    with pytest.raises(EngineError, match="init_runtime raised AttributeError: 'NoneType' object has no attribute"):
        RknnEncoder(navit.board, navit.vision)


def test_a_lite2_that_hides_its_runs(
    navit: ModelSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rknnlite.api import rknn_lite

    from mmchat.rknn_vision import RknnEncoder

    class Hidden:
        def __init__(self, data: bytes) -> None:
            pass

    monkeypatch.setattr(rknn_lite, "RKNNRuntime", Hidden)
    assert navit.board
    RknnEncoder(navit.board, navit.vision)
    assert "a failed run cannot be told" in capsys.readouterr().out


def test_a_failed_encoder_costs_the_turn_and_not_the_conversation(
    navit: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mmchat.open(navit.folder, store=tmp_path / "store", n_threads=1) as runtime:
        session = runtime.session()
        assert session.ask("What colour is the circle?", picture(0), **GREEDY).text
        with monkeypatch.context() as patch:
            patch.setenv("RKNN_STANDIN_NONE", "1+")
            runtime.vision.worker.kill()  # what runs has the old environment
            with pytest.raises(EngineError, match="the NPU gave no result"):
                session.ask("And in this one?", picture(1), **GREEDY).text  # noqa: B018
        assert len(session.turns) == len(session.images) == 1
        assert session.ask("And in this one?", picture(1), **GREEDY).text
        assert "no result" not in session.turns[-1].text


# With RKLLM on the same board


def test_a_conversation_on_the_command_line_is_openvinos(navit: ModelSpec, tmp_path: Path) -> None:
    """Six turns, four pictures, both stand-ins; and the files of the folder alone."""
    numbers, typed = itertools.count(), ""
    for question, n_images in TURNS:
        for _ in range(n_images):
            path = tmp_path / f"{next(numbers)}.png"
            picture(int(path.stem)).save(path)
            typed += f"/image {path}\n"
        typed += f"{question}\n"

    def talk(model: str, **environ: str) -> str:
        program = "from mmchat.cli import main; main()"
        command = [sys.executable, "-c", program, "chat", "--model", model, "--temperature", "0"]
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        root = str(Path(__file__).resolve().parents[1])
        environ = {**outside, **environ, "PYTHONPATH": os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), root]))}
        done = subprocess.run(command, input=typed, capture_output=True, text=True, env=environ, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = navit.folder
    told = talk(str(folder), PYTHONPATH=str(folder / LITE2.name), MMCHAT_RKLLM_LIB=str(folder / LIBRARY))
    assert told == talk("demo")
    assert len(told.splitlines()) >= len(TURNS)


MAPS = """
import sys
import mmchat
from pathlib import Path
from tests.conversation import GREEDY, picture

def maps(pid):
    return [name for name in ("librkllmrt", "librknnrt", "openvino") if name in Path(f"/proc/{pid}/maps").read_text()]

if __name__ == "__main__":
    with mmchat.open(sys.argv[1], n_threads=1) as runtime:
        assert runtime.session().ask("What colour is the circle?", picture(0), **GREEDY).text
        heavy = [name for name in sys.modules if name.partition(".")[0] in ("rknnlite", "openvino")]
        print(maps("self"), heavy, maps(runtime.vision.worker.pid), maps(runtime.llm.worker.pid))
"""


def test_each_vendors_library_is_in_its_own_worker_and_never_in_the_parent(
    navit: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RKLLM segfaults beside librknnrt; the stand-in does so too where it finds one in its process."""
    monkeypatch.setenv("RKLLM_STANDIN_SEGFAULT_RKNN", "1")
    root = str(Path(__file__).resolve().parents[1])
    environ = {**os.environ, "PYTHONPATH": f"{LITE2}{os.pathsep}{root}"}
    command = [sys.executable, "-c", MAPS, str(navit.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=200)
    assert done.stdout.strip() == "[] [] ['librknnrt'] ['librkllmrt']", done.stderr


@pytest.fixture
def one_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both stand-ins fail where they compute at the same time; the folder holds what they did."""
    for name in ("RKLLM_STANDIN", "RKNN_STANDIN"):
        monkeypatch.setenv(f"{name}_NPU", str(tmp_path / "npu"))
        monkeypatch.setenv(f"{name}_TRACE", str(tmp_path / name))
    return tmp_path


def test_encoder_and_llm_never_compute_at_the_same_time(
    navit: ModelSpec, one_npu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three conversations at once, in threads, with new pictures in every turn."""
    monkeypatch.setenv("RKNN_STANDIN_ENCODE_MS", "30")
    monkeypatch.setenv("RKLLM_STANDIN_DECODE_MS", "5")
    answers: dict[int, list[str]] = {}

    def converse(runtime: Runtime, number: int) -> list[str]:
        session, told = runtime.session(), []
        for turn in range(3):
            image = Image.new("RGB", (112, 112), (80 * number, 80 * turn, 40))
            reply = session.ask("What colour is it?", image, **GREEDY)
            told.append(reply.text)
            assert reply.usage.restarts == 0
        return told

    with mmchat.open(navit.folder, store=one_npu / "store", n_threads=1) as runtime:

        def run(number: int) -> None:
            answers[number] = converse(runtime, number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {number: converse(runtime, number) for number in range(3)}  # one after the other
    encodings = [one for one in traced(one_npu / "RKNN_STANDIN") if one["call"] == "inference"]
    runs = [one for one in traced(one_npu / "RKLLM_STANDIN") if one["call"] == "run"]
    assert len(encodings) == 9
    assert len(runs) == 18
    assert {one["end"] for one in runs} == {"finish"}


def test_without_the_lock_they_would(navit: ModelSpec, one_npu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LLM is held within a run, and the encoder knows nothing of it."""
    monkeypatch.setenv("RKLLM_STANDIN_HANG", "1+")
    library_path = navit.folder / LIBRARY
    rkllm = Rkllm(library_path, Profile.open(navit, library_path), npu=None)
    store = Store(one_npu / "store")
    with Runtime(navit, store, context_rows=navit.context_rows, n_threads=1, rkllm=rkllm) as runtime:

        def run() -> None:
            with contextlib.suppress(EngineError):  # closed while it had work to do
                runtime.session().ask("Hello.", **GREEDY).text  # noqa: B018

        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: is_taken(one_npu / "npu"), timeout_s=100)
        with pytest.raises(EngineError, match="gave no result"):
            runtime.vision.encode(keyed(navit, [pixels(2, 2)]))
        runtime.llm.worker.kill()
        runtime.llm.worker.close()
        thread.join()
        assert runtime.vision.encode(keyed(navit, [pixels(2, 2)])).n_slices == 1


def is_taken(npu: Path) -> bool:
    """Without trying to take it, which would be in the LLM's way."""
    return npu.exists() and f":{npu.stat().st_ino} " in Path("/proc/locks").read_text()
