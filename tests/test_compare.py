"""compare: facts that are counted by hand, two models end to end, and the files of a report."""

from __future__ import annotations

import csv
import html
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.checkpoint import Checkpoint, write_tensors
from mmchat.compare import asking, facts, report
from mmchat.compare.facts import Compared, Said, compare_answers, compare_slices, cosine
from mmchat.compare.judge import ClipJudge
from mmchat.convert import vision_onnx
from mmchat.convert.toolkit import RKNN
from mmchat.errors import ImageError, ModelDirError
from mmchat.model_dir import open_model
from tests.test_cli import refused, run_here
from tests.test_convert import quiet
from tests.test_demo import picture
from tests.toolkits import write_python

DEMO = open_model("demo").folder


def said(text: str, ids: tuple[int, ...]) -> Said:
    return Said(text, ids, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "agreement", "diverges_at"),
    [
        ((1, 2, 3), (1, 2, 3), 1.0, None),
        ((1, 2, 3), (1, 9, 3), 2 / 3, 1),
        ((1, 2, 3, 4), (1, 2), 0.5, 2),
        ((1,), (1, 2, 3, 4), 0.25, 1),
        ((), (5,), 0.0, 0),
        ((), (), 1.0, None),
    ],
)
def test_tokens_are_compared_place_by_place(
    a: tuple[int, ...], b: tuple[int, ...], agreement: float, diverges_at: int | None
) -> None:
    found = compare_answers(said("x", a), said("x", b), same_tokens=True)
    assert found.agreement == pytest.approx(agreement)
    assert found.diverges_at == diverges_at


def test_other_tokenizers_leave_the_texts_to_be_compared() -> None:
    found = compare_answers(said("a red star", (1, 2)), said("a blue star", (1, 2)), same_tokens=False)
    assert (found.agreement, found.diverges_at, found.same) == (None, None, False)
    assert found.similarity == pytest.approx(2 * len("a e star") / 21)
    assert compare_answers(said("", ()), said("", ()), same_tokens=True).similarity == 1


def test_embeddings_are_compared_slice_by_slice() -> None:
    rng = np.random.default_rng(0)
    a = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(3)]
    b = [a[0], -2 * a[1], a[2] + np.float32(0.25)]
    found = compare_slices(a, b)
    assert found.cosines is not None
    assert found.max_errors is not None
    assert found.cosines[:2] == pytest.approx((1, -1))
    assert found.max_errors[2] == pytest.approx(0.25, rel=1e-5)
    assert 0 < found.cosines[2] < 1
    assert compare_slices(a, b[:2]).cosines is None
    assert compare_slices(a, [*b[:2], b[2][:3]]).cosines is None
    assert (cosine(a[0] * 0, a[0] * 0), cosine(a[0] * 0, a[0])) == (1, 0)


def test_the_summary_counts_a_pictures_slices_once() -> None:
    same = facts.Slices((1.0, 0.5), (0.0, 0.1))
    yes = compare_answers(said("yes", (1,)), said("yes", (1,)), same_tokens=True)
    no = compare_answers(said("yes", (1, 2)), said("no", (1, 3)), same_tokens=True)
    found = [
        Compared("p", "q", same, yes),
        Compared("p", "r", same, no),
        Compared("z", "q", facts.Slices(None, None), no),
    ]
    sums = facts.summary(found)
    assert (sums["slices"], sums["least_cosine"], sums["mean_cosine"], sums["cut_differently"]) == (2, 0.5, 0.75, 1)
    assert (sums["same_answers"], sums["answers"], sums["first_divergence"]) == (1, 3, 1)
    assert sums["mean_agreement"] == pytest.approx(2 / 3)
    assert sums["judged_a"] is None
    assert facts.summary([])["least_cosine"] is None


# --- two models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, its last vision layer disturbed."""
    folder = tmp_path_factory.mktemp("models") / "other"
    folder.mkdir()
    source, rng = Checkpoint(DEMO), np.random.default_rng(0)
    arrays = {name: source.array(name) for name in source}
    name = "resampler.proj"
    noise = rng.standard_normal(arrays[name].shape) * 0.8 * arrays[name].std()
    arrays[name] = (arrays[name] + noise).astype(arrays[name].dtype)
    write_tensors(
        folder / "model.safetensors",
        {key: (source.info(key).dtype, array.shape, [array.tobytes()]) for key, array in arrays.items()},
    )
    for path in DEMO.glob("*.json"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture("circle", "red", "blue").save(folder / "a <b>.png")
    picture("square", "green", "white", (100, 110)).save(folder / "c.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_two_models_end_to_end(other: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("compare", "demo", other, "--pictures", pictures, "--threads", "1", "--max-new-tokens", "16")
    code, out, err = run_here(*words, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "compare.json").read_text())
    sums = result["summary"]
    assert (sums["pictures"], sums["questions"], sums["answers"]) == (2, 1, 2)
    assert 0.1 < sums["least_cosine"] < sums["mean_cosine"] < 0.99
    first, second = result["compared"]
    assert (first["picture"], second["picture"]) == ("a <b>.png", "c.jpg")
    assert len(second["slices"]["cosines"]) == 1 < len(first["slices"]["cosines"])
    assert "red circle" in first["answers"]["a"]["text"]
    for one in (first, second):
        a, b = (one["answers"][which] for which in "ab")
        assert (
            one["answers"]["agreement"]
            == compare_answers(
                said(a["text"], tuple(a["ids"])), said(b["text"], tuple(b["ids"])), same_tokens=True
            ).agreement
        )
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["answer_b"] for row in rows] == [one["answers"]["b"]["text"] for one in result["compared"]]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "a &lt;b&gt;.png" in page
    assert "<b>" not in page


@given(st.text(), st.text())
def test_answers_never_become_markup(a: str, b: str) -> None:
    answers = compare_answers(said(a, (1,)), said(b, (2,)), same_tokens=True)
    cells = [report._answer("<x>", answers, which) for which in (0, 1)]
    for cell, text in zip(cells, (a, b), strict=True):
        content = re.sub(r"</?(tr|th|td|mark)>", "", cell)
        assert "<" not in content
        assert html.unescape(content) == html.unescape(html.escape("<x>")) + html.unescape(html.escape(text))


def test_mistakes_are_told_before_a_model_is_loaded(pictures: Path, tmp_path: Path) -> None:
    words = ("compare", "demo", "demo", "--pictures")
    assert "no such folder of pictures" in refused(*words, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no pictures in it" in refused(*words, tmp_path / "empty")
    assert "there is no judge 'me'" in refused(*words, pictures, "--judge", "me", code=2)
    assert "belong together" in refused(*words, pictures, "--judge", "clip", code=2)
    assert "no such model folder" in refused("compare", "demo", tmp_path / "none", "--pictures", pictures)
    (pictures / "bad.png").write_bytes(b"\x89PNG garbage")
    with pytest.raises(ImageError, match=r"bad\.png"):
        importlib.import_module("mmchat.compare.asking").pictures_in(pictures)


def test_openvino_against_rkllm(pictures: Path, board_folders: Callable[[str], Path]) -> None:
    """The board's folder has the demo model, and a stand-in for the vendor's library."""
    folder = board_folders("1.3.0")
    code, out, err = run_here(
        "compare", "demo", folder, "--pictures", pictures, "--limit", "1", "--max-new-tokens", "8", "--threads", "1",
        "--engine-a", "openvino", "--engine-b", "rkllm", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert (result["a"], result["b"]) == ("demo", folder.name)
    assert result["summary"]["mean_agreement"] == 1
    assert len(result["compared"][0]["answers"]["b"]["ids"]) == 8
    assert result["summary"]["least_cosine"] > 0.99999


# --- encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx") / "vision"
    vision_onnx.run(vision_onnx.plan(open_model("demo"), 80), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that gives zeros for all it sees."""
    onnx: Any = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("onnx") / "blind"
    vision_onnx.run(vision_onnx.plan(open_model("demo"), 80), folder, quiet)
    model = onnx.load(folder / "vision.onnx")
    zeros = next(one for one in model.graph.initializer if one.name == "resampler.proj")
    zeros.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(zeros.dims), np.float32), zeros.name))
    onnx.save(model, folder / "vision.onnx")
    return folder


def test_the_llm_answers_with_the_encoders_rows(onnx: Path, blind: Path, pictures: Path) -> None:
    """And not with those of the encoder it has."""
    code, out, err = run_here(
        "compare", onnx, blind, "--llm", "demo", "--pictures", pictures, "--limit", "1", "--max-new-tokens", "10",
        "--threads", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert (result["a"], result["b"]) == ("vision", "blind")
    assert (result["summary"]["slices"], result["summary"]["least_cosine"]) == (5, 0)
    answers = result["compared"][0]["answers"]
    assert "red circle" in answers["a"]["text"]
    assert "red circle" not in answers["b"]["text"]


def test_a_model_and_its_encoder_in_onnx(onnx: Path, pictures: Path) -> None:
    """The LLM is the model's own, since none was named."""
    words = ("--pictures", pictures, "--limit", "1", "--max-new-tokens", "4", "--max-slices", "1", "--threads", "1")
    code, out, err = run_here("compare", "demo", onnx, *words, "--json")
    assert code == 0, err
    sums = json.loads(out)["summary"]
    assert (sums["slices"], sums["same_answers"], sums["mean_agreement"]) == (1, 1, 1)
    assert 0 < sums["max_error"] < 1e-4
    assert sums["least_cosine"] > 0.99999


def test_two_encoders_are_compared_in_their_embeddings(onnx: Path, pictures: Path, tmp_path: Path) -> None:
    """onnxruntime and the simulator, which a stand-in is here, with its noise."""
    python = write_python(tmp_path / "python", noise=0.1, rules=["fuse_of_the_next_release"])
    words = (f"rknn-sim:{onnx}", "--pictures", pictures, "--rknn-python", python)
    code, out, err = run_here("compare", onnx, *words, "--json", "-o", tmp_path / "out")
    assert code == 0, err
    assert "rknn-toolkit2: simulator, view 6 of 6" in err
    assert "again without" in err
    result = json.loads(out)
    assert (result["a"], result["b"]) == ("vision", "rknn-sim:vision")
    sums = result["summary"]
    assert (sums["pictures"], sums["slices"], sums["answers"], sums["questions"]) == (2, 6, 0, 0)
    assert 0.99 < sums["least_cosine"] < 0.9999
    assert 0.2 < sums["max_error"] < 1
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["slices"], row["answer_a"]) for row in rows] == [("5", ""), ("1", "")]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "<h2>" not in page
    found = [Compared("p", "", facts.Slices((0.5,), (1.0,)), None)]
    assert [name for name, _ in report.rows(found)] == [
        "pictures", "cosine of embeddings", "largest difference", "of slices",
    ]  # fmt: skip


def test_mistakes_about_encoders(onnx: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--pictures", pictures)
    assert "--llm is for an encoder" in refused("compare", "demo", "demo", *words, "--llm", "demo", code=2)
    assert "encoders do not answer" in refused("compare", onnx, onnx, *words, "--question", "What?", code=2)
    assert "make it with mmchat convert vision-onnx" in refused("compare", f"rknn-sim:{tmp_path}", onnx, *words)
    assert "rk3566" in refused("compare", f"rknn-sim:{onnx}", onnx, *words, "--rknn-chip", "rk3566", code=2)
    monkeypatch.delenv("MMCHAT_RKNN_PYTHON", raising=False)
    assert "--rknn-python" in refused("compare", f"rknn-sim:{onnx}", onnx, *words)
    small = tmp_path / "small"
    vision_onnx.run(vision_onnx.plan(open_model("demo"), 20), small, quiet)
    assert "has 64 patches" in refused("compare", "demo", small, *words)
    wide = replace(open_model("demo").vision, query_num=7)
    monkeypatch.setattr(asking, "open_model", lambda name: replace(open_model(name), vision=wide))
    assert "7 rows of" in refused("compare", onnx, "demo", *words)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in refused("compare", onnx, onnx, *words)


@pytest.mark.skipif(
    not os.environ.get(RKNN.variable) or settings().max_examples < 1000,
    reason=f"needs rknn-toolkit2 ({RKNN.variable}) and --hypothesis-profile=deep",
)
def test_the_real_simulator_answers_as_the_model_does(onnx: Path, pictures: Path) -> None:
    code, out, err = run_here("compare", "demo", f"rknn-sim:{onnx}", "--pictures", pictures, "--json")
    assert code == 0, err
    sums = json.loads(out)["summary"]
    assert (sums["slices"], sums["same_answers"]) == (6, 2)
    assert sums["least_cosine"] >= 0.999


# --- the judge --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of a few thousand random numbers."""
    if settings().max_examples < 1000:
        pytest.skip("deep runs only: torch and transformers take ten seconds to import")
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 800, "max_position_embeddings": 20, "eos_token_id": 799},
        vision_config={**small, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    shutil.copy(DEMO / "tokenizer.json", folder)
    return folder


def test_the_judge_scores_as_the_model_does(clip: Path, pictures: Path) -> None:
    """Against CLIPModel's own logits: 100 times the cosine, but for its scale."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    from tokenizers import Tokenizer

    judge, path = ClipJudge(clip), pictures / "c.jpg"
    texts = ["A red circle.", "star " * 60]
    scores = [judge.score(path, text) for text in texts]
    model = transformers.CLIPModel.from_pretrained(clip)
    from PIL import Image

    image = Image.open(path).convert("RGB").resize((28, 31), Image.Resampling.BICUBIC).crop((0, 1, 28, 29))
    pixels = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
    for text, score in zip(texts, scores, strict=True):
        ids = Tokenizer.from_file(str(clip / "tokenizer.json")).encode(text).ids[:20]
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
            )
        wanted = 100 * float(out.logits_per_image[0, 0]) / float(model.logit_scale.detach().exp())
        assert score == pytest.approx(max(0.0, wanted), abs=1e-3)
    assert judge.score(path, " ") == 0


def test_what_the_judge_lacks_is_named(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelDirError, match=r"lacks config\.json.*openai/clip"):
        ClipJudge(tmp_path)
    broken = Path(shutil.copytree(clip, tmp_path / "clip"))
    (broken / "config.json").write_text("{}")
    (broken / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelDirError, match="not a CLIP model that transformers opens"):
        ClipJudge(broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelDirError, match="pip install torch transformers"):
        ClipJudge(clip)
