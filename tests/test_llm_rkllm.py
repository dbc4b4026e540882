"""convert llm-rkllm: asks rkllm-toolkit for what was asked for, with samples that equal what a chat would feed.

The toolkit is a stand-in with the documented signatures (tests/toolkits): nobody could run the real one here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmchat import outputs
from mmchat.convert import llm_rkllm
from mmchat.convert.calibration import QUESTION, Embedder, Talk, talks_in
from mmchat.convert.llm_rkllm import Options
from mmchat.errors import DiskFull, ModelDirError, OptionError, ToolkitError
from mmchat.model_dir import open_model
from tests.test_cli import mmchat_command, refused
from tests.test_convert import quiet
from tests.toolkits import write_python

OPTIONS = Options("rk3588", "w8a8", max_context=2048)


def build(
    folder: Path, options: Options = OPTIONS, calibration: Path | None = None, **behaviour: Any
) -> dict[str, Any]:
    """Into folder/m.rkllm, with a toolkit that behaves like this; the report."""
    python = write_python(folder / "python", **behaviour)
    plan = llm_rkllm.plan("demo", options, calibration)
    return llm_rkllm.run(plan, folder / "m.rkllm", python, print, quiet)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("python", "pictures"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate(((112, 112), (40, 300))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_the_command_asks_for_what_was_asked_for(tmp_path: Path, pictures: Path) -> None:
    env = {"MMCHAT_RKLLM_PYTHON": str(write_python(tmp_path / "python", suffix=True))}
    words = ("convert", "llm-rkllm", "demo", tmp_path / "m.rkllm", "--target", "rk3576", "--dtype", "w4a16_g32")
    out, _ = mmchat_command(*words, "--max-context", "1024", "--dry-run")
    assert "takes about" in out
    assert left(tmp_path) == []
    more = ("--max-context", "1024", "--optimization-level", "0", "--num-npu-core", "1", "--calibration", pictures)
    out, err = mmchat_command(*words, *more, "--load-dtype", "bfloat16", env=env)
    assert out == f"{tmp_path / 'm.rkllm'}\n"
    assert "sample 2 of 2: 1.png" in err
    assert left(tmp_path) == ["m.rkllm", "m.rkllm.json"]
    asked = json.loads((tmp_path / "m.rkllm").read_text())
    assert asked["load"] == {"device": "cpu", "dtype": "bfloat16"}
    assert asked["build"] == {
        "do_quantization": True,
        "optimization_level": 0,
        "quantized_dtype": "w4a16_g32",
        "quantized_algorithm": "normal",
        "target_platform": "rk3576",
        "num_npu_core": 1,
        "extra_qparams": None,
        "hybrid_rate": 0.0,
        "max_context": 1024,
    }
    assert len(asked["samples"]) == 2
    report = json.loads((tmp_path / "m.rkllm.json").read_text())
    assert (report["dtype"], report["samples"], report["ignored"]) == ("w4a16_g32", 2, [])


def test_samples_equal_what_a_chat_feeds(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a session sends, of the same picture and question."""
    import mmchat
    from mmchat.embed_table import EmbedTable
    from mmchat.embedding import assemble

    spec, sent = open_model("demo"), []
    with mmchat.open("demo", n_threads=1) as runtime:
        generate = runtime.llm.generate

        def watched(pieces: Any, *rest: Any, **named: Any) -> Any:
            sent.append(pieces)
            return generate(pieces, *rest, **named)

        monkeypatch.setattr(runtime.llm, "generate", watched)
        reply = runtime.session(sampling={"max_new_tokens": 1}).ask(QUESTION, images=[pictures / "1.png"])
        assert reply.usage.n_new == 1
        wanted = assemble(sent[0], EmbedTable.open(spec.embed_table_path), runtime.store.get)
    found = Embedder(spec).rows(Talk(pictures / "1.png"))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-5


def test_the_vendors_list_of_samples(tmp_path: Path, pictures: Path) -> None:
    told = [
        {"image_path": "pictures", "image": "0.png", "input": "What is it?", "target": "Noise."},
        {"image": "1.png", "image_path": str(pictures)},
    ]
    (tmp_path / "datasets.json").write_text(json.dumps(told))
    talks = talks_in(tmp_path / "datasets.json")
    assert talks == [Talk(pictures / "0.png", "What is it?", "Noise."), Talk(pictures / "1.png", QUESTION, "")]
    report = build(tmp_path, calibration=tmp_path / "datasets.json")
    assert report["samples"] == 2
    samples = json.loads((tmp_path / "m.rkllm").read_text())["samples"]
    rows = Embedder(open_model("demo")).rows(talks[0])
    assert samples[0][:2] == [len(rows), "Noise."]
    assert samples[1][1] is None
    assert samples[0][2] == float(np.float16(rows[0, 0]))


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "no", '[{"input": "x"}]', '[{"image": "no.png"}]', '[{"image": "0.png", "input": 3}]'],
)
def test_a_bad_list_of_samples_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ModelDirError, match=r"x\.json"):
        llm_rkllm.plan("demo", OPTIONS, tmp_path / "x.json")


def test_older_toolkits_take_less_and_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = build(tmp_path, release="1.1")
    assert report["ignored"] == ["dtype", "max_context"]
    assert "takes no max_context" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target": "rk3566"}, "known are rk3588, rk3576"),
        ({"dtype": "w4a16"}, "the dtype for rk3588 is 'w4a16'; known are w8a8, w8a8_g128"),
        ({"target": "rk3576", "dtype": "w8a8_g128"}, "w4a16_g64"),
        ({"max_context": 1000}, "a multiple of 32 up to 16384"),
        ({"max_context": 32768}, "a multiple of 32 up to 16384"),
        ({"num_npu_core": 4}, "known are 1, 2, 3"),
        ({"target": "rk3576", "num_npu_core": 3}, "known are 1, 2"),
        ({"optimization_level": 2}, "known are 0, 1"),
        ({"algorithm": "gdq"}, "is for four bits"),
        ({"target": "rk3576", "dtype": "w4a16", "algorithm": "grq"}, "needs a GPU"),
        ({"hybrid_rate": 1.0}, "below 1"),
        ({"load_dtype": "int8"}, "known are float32"),
    ],
)
def test_what_the_toolkit_does_not_take_is_refused_at_once(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as raised:
        Options(**{"target": "rk3588", "dtype": "w8a8", **values})
    assert said in str(raised.value)


def test_more_context_than_the_model_has_is_refused(tmp_path: Path) -> None:
    words = ("convert", "llm-rkllm", "demo", tmp_path / "m.rkllm", "--target", "rk3588")
    assert "the model knows 2048 positions" in refused(*words, "--max-context", "4096", code=2)
    assert "w8a8_g128" in refused(*words, "--dtype", "w9", code=2)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"load": 1}, "load_huggingface failed (returned -1); it said: ERROR: Catch exception when loading model"),
        ({"nothing": 1}, "wrote nothing"),
    ],
)
def test_what_goes_wrong_is_told_and_the_plain_folder_kept(
    tmp_path: Path, behaviour: dict[str, Any], said: str
) -> None:
    """It is the 15 GB that were copied already."""
    with pytest.raises(ToolkitError) as raised:
        build(tmp_path, **behaviour)
    assert said in str(raised.value)
    assert left(tmp_path) == ["m.rkllm.log", "m.rkllm.qwen2"]
    build(tmp_path)
    assert left(tmp_path) == ["m.rkllm", "m.rkllm.json"]


def test_a_full_disk_is_told_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 50_100_000)
    with pytest.raises(DiskFull, match="make room"):
        build(tmp_path)
    assert left(tmp_path) == []
