"""The import order: modules import from earlier layers only, and what is heavy stays out of who must be light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PACKAGE = Path(__file__).resolve().parents[1] / "mmchat"

# Left to right, as in the design; modules of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "vision_inputs", "patient"),
    ("slicing", "frames", "sections", "checkpoint", "store", "engine", "rkllm_abi", "rknn_file"),
    ("board_files", "half_made"),
    (
        "images",
        "decoding",
        "embed_table",
        "model_dir",
        "prompt",
        "record",
        "overlay",
        "child",
        "worker",
        "rkllm_detect",
        "bundle",
    ),
    ("embedding", "context", "doctor_npu", "profile", "transcript"),
    ("openvino_graphs", "doctor", "rkllm_model", "probe_runs", "forecast", "saving"),
    ("rkllm_answer", "probes", "probe_ladder", "probe_pictures", "openvino_ir"),
    ("openvino_engine", "openvino_vision", "rkllm_embed", "rknn_vision"),
    ("vision_proc", "llm_proc", "probe_child"),
    ("session",),
    ("outputs",),
    ("fetch",),
    ("convert", "pull"),
    ("runtime", "calibrate"),
    ("bench", "video", "compare", "regress"),
    ("cli",),
    ("__main__",),
)
LAYER = {module: number for number, layer in enumerate(LAYERS) for module in layer}
# The only ones that name an engine; the composition root names their clients.
_OPENVINO = {"openvino_graphs", "openvino_ir", "openvino_engine", "openvino_vision"}
ENGINES = {*_OPENVINO, "rkllm_model", "rkllm_embed", "rknn_vision"}


def modules() -> dict[str, list[Path]]:
    """Module -> its files; a folder with an __init__ (cli) is one module."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    found.update({path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")})
    return found


def imported(path: Path) -> set[str]:
    """Modules of mmchat that a file imports anywhere, in functions and for types included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the order"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mmchat.")}


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(LAYER)


@pytest.mark.parametrize("module", sorted(LAYER))
def test_imports_point_left(module: str) -> None:
    for path in modules()[module]:
        for other in (imported(path) & set(LAYER)) - {module}:
            assert LAYER[other] < LAYER[module], f"{path.name} imports {other}"


def test_the_session_sees_protocols_only() -> None:
    """Neither engines nor their processes; only runtime puts them together."""
    assert not imported(PACKAGE / "session.py") & (ENGINES | {"vision_proc", "llm_proc", "worker"})
    users = {
        module for module, paths in modules().items() for path in paths if imported(path) & {"vision_proc", "llm_proc"}
    }
    assert users - {"vision_proc", "llm_proc"} == {"runtime"}


def loaded_by(code: str, *arguments: object) -> set[str]:
    """Everything in sys.modules after code has run in a fresh interpreter, packages included."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)", *map(str, arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout
    return set(output.split())


HEAVY = {"numpy", "PIL", "openvino", "msgpack", "tokenizers", "typer", "rich", "prompt_toolkit", "torch"}


def test_importing_mmchat_imports_nothing_heavy() -> None:
    assert not loaded_by("import mmchat") & HEAVY
    assert not loaded_by("import mmchat; mmchat.MmchatError, mmchat.ContextFull, dir(mmchat)") & HEAVY


@pytest.mark.parametrize("module", ["session", "runtime", "llm_proc", "vision_proc", "video", "cli", "doctor"])
def test_the_parent_imports_no_engine(module: str) -> None:
    """The engine lives in the workers; what picks and talks to them does not load it."""
    assert not loaded_by(f"import mmchat.{module}") & {"openvino", "torch", "rknnlite", "av"}


@pytest.mark.parametrize("module", ["child", "worker", "frames", "errors"])
def test_what_every_worker_runs_is_light(module: str) -> None:
    assert not loaded_by(f"import mmchat.{module}") & (HEAVY - {"msgpack"})


def test_opening_the_runtimes_names_imports_no_engine() -> None:
    assert not loaded_by("import mmchat; mmchat.open, mmchat.Session, mmchat.Runtime") & {"openvino", "torch"}


def test_video_is_loaded_when_it_is_used() -> None:
    assert "mmchat.video" not in loaded_by("import mmchat")
    assert "mmchat.video" in loaded_by("import mmchat; mmchat.video.captions")


def test_pictures_are_read_with_the_plug_ins_they_need(tmp_path: Path) -> None:
    """Not with all of Pillow's: each costs time, and EPS runs another program."""
    Image.new("RGB", (2, 2)).save(tmp_path / "dot.png")
    code = "import sys; from mmchat.images import read_image; read_image(sys.argv[1])"
    plug_ins = {name for name in loaded_by(code, tmp_path / "dot.png") if name.endswith("ImagePlugin")}
    assert "PIL.PngImagePlugin" in plug_ins
    assert not plug_ins & {"PIL.EpsImagePlugin", "PIL.PsdImagePlugin", "PIL.WmfImagePlugin", "PIL.PdfImagePlugin"}
