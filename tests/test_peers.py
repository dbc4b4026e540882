"""The peer, openvino_genai's VLMPipeline, on a folder that mmchat converted: the same tokens, and a ratio of times."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmchat
from mmchat.bench import peers, record
from mmchat.convert import openvino_folder
from mmchat.errors import ModelDirError
from mmchat.model_dir import open_model
from tests.test_convert import quiet
from tests.test_demo import CIRCLE, DESCRIBE, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("openvino_genai", "openvino_tokenizers", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    path = tmp_path_factory.mktemp("peers") / "ir"
    openvino_folder.run(openvino_folder.plan(open_model("demo"), "fp32"), path, quiet)
    return path


# Of one view, and of several: our own folders hide padding from the peer, too.
SIZES = [(112, 112), (100, 120), (90, 90), (200, 200), (300, 180)]


def test_the_first_turn_has_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    peer = peers.Peer(folder, n_threads=1)
    with mmchat.open(folder, store=tmp_path / "store", n_threads=1) as runtime:
        for number, size in enumerate(SIZES):
            shown = picture(("circle", "square")[number % 2], "red", ("blue", "white")[number % 2], size)
            question = (DESCRIBE, CIRCLE)[number // 4]
            peer.begin()
            text, ids = peer.ask(question, [shown], 24)
            session = runtime.session()
            assert session.ask(question, [shown], temperature=0.0, max_new_tokens=24).text == text
            assert [one for one in ids if one not in runtime.tokenizer.stop_ids] == list(session.turns[0].ids)
            assert len(ids) > 4


def test_the_bench_tells_the_ratio_of_the_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its first two turns; all of them take minutes on a busy machine."""
    monkeypatch.setattr(peers, "QUESTIONS", peers.QUESTIONS[:2])
    found = peers.run(str(folder), lambda text: None, rounds=1, n_threads=1)
    figures = found["peers"]
    assert figures["ratio"] == pytest.approx(figures["mmchat_s"] / figures["peer_s"])
    assert figures["same_answers"] >= 1
    assert f"| ratio | {figures['ratio']:.2f} |" in record.to_markdown({**record.context(), **found})


def test_what_the_peer_lacks_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelDirError, match=r"lacks openvino_tokenizer\.xml and openvino_detokenizer\.xml"):
        peers.Peer(tmp_path)
    with pytest.raises(ModelDirError, match="not an OpenVINO folder"):
        peers.run(str(open_model("demo").folder), lambda text: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelDirError, match="pip install openvino-genai"):
        peers.Peer(folder)
