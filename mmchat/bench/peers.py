"""The same chat in openvino_genai's VLMPipeline: the same folder, pictures and questions, greedy, in turns.

The peer's answers are compared, too.  Its first turn has the same rows as ours.  Later ones need not: it makes the
token ids of its own answers anew from their text.  And of a folder that an exporter wrote, pictures that are cut
differ: the peer's padding mask hides nothing there (mmchat.openvino_graphs.build_resampler says why).
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mmchat
from mmchat.bench.pictures import draw
from mmchat.errors import ModelDirError
from mmchat.model_dir import DEMO, open_model

ROUNDS = 5
MAX_NEW_TOKENS = 64
QUESTIONS = (
    "What color is the background?",
    "How many shapes are there?",
    "Describe the image.",
    "What shapes are there in the last image?",
    "Is there any text?",
    "Describe the image.",
)
_TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")


class Peer:
    """A pipeline and one conversation in it."""

    def __init__(self, folder: Path, *, n_threads: int | None = None) -> None:
        """Raises ModelDirError: the package or its tokenizer models are not there."""
        if importlib.util.find_spec("openvino_genai") is None:
            raise ModelDirError("the peer is not installed: pip install openvino-genai (of openvino's own version)")
        if missing := [name for name in _TOKENIZERS if not (folder / name).is_file()]:
            raise ModelDirError(
                f"{folder}: lacks {' and '.join(missing)}, which openvino_genai needs; mmchat convert openvino writes "
                "them where the packages openvino-tokenizers and transformers are installed"
            )
        self._genai: Any = importlib.import_module("openvino_genai")
        properties: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY", "ATTENTION_BACKEND": "SDPA"}
        if n_threads:
            properties["INFERENCE_NUM_THREADS"] = n_threads
        self._pipeline = self._genai.VLMPipeline(str(folder), "CPU", **properties)
        self.begin()

    def begin(self) -> None:
        """A new conversation."""
        self._history = self._genai.ChatHistory()

    def ask(self, question: str, pictures: list[Image.Image], max_new_tokens: int) -> tuple[str, list[int]]:
        """The answer, and its token ids as they came, an end token included."""
        import openvino

        genai, ids = self._genai, list[int]()
        base: Any = genai.StreamerBase

        class Listener(base):  # type: ignore[misc]
            def write(self, tokens: int | list[int]) -> Any:
                ids.extend([tokens] if isinstance(tokens, int) else tokens)
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = max_new_tokens, False
        images = [openvino.Tensor(np.array(picture.convert("RGB"))[None]) for picture in pictures]
        self._history.append({"role": "user", "content": question})
        said = self._pipeline.generate(self._history, images=images, generation_config=config, streamer=Listener())
        self._history.append({"role": "assistant", "content": said.texts[0]})
        return str(said.texts[0]), ids


def run(
    model: str, say: Callable[[str], None], *, rounds: int = ROUNDS, n_threads: int | None = None
) -> dict[str, Any]:
    """model: an OpenVINO folder with the peer's tokenizers, or "demo", which is converted for the while.

    Raises ModelDirError, and what opening the model and asking raise.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(model)
        if model == DEMO:
            from mmchat.convert import openvino_folder

            folder = Path(place) / "openvino"
            say("peers: converting the demo model")
            openvino_folder.run(openvino_folder.plan(open_model(DEMO), "fp32"), folder, lambda *_: None)
        elif not open_model(model).openvino:
            raise ModelDirError(f"{model}: not an OpenVINO folder, which both open; mmchat convert openvino makes one")
        peer = Peer(folder, n_threads=n_threads)
        with mmchat.open(folder, store=Path(place) / "store", n_threads=n_threads) as runtime:
            taken = []
            for number in range(rounds + 1):  # the first warms up
                say(f"peers: round {number} of {rounds}")
                runtime.store.clear()
                peer.begin()
                taken.append(_round(runtime.session(), peer))
    ours, theirs = (statistics.median(one[place] for one in taken[1:]) for place in (0, 1))
    return {
        "peers": {
            "peer": f"openvino_genai {version('openvino_genai')}",
            "turns": len(QUESTIONS),
            "pictures": len(QUESTIONS),
            "rounds": rounds,
            "mmchat_s": ours,
            "peer_s": theirs,
            "ratio": ours / theirs,
            "same_answers": taken[-1][2],
        }
    }


def _round(session: mmchat.Session, peer: Peer) -> tuple[float, float, int]:
    """Seconds of ours and of the peer's, turn by turn; and answers that are the same from the first on."""
    ours = theirs = 0.0
    same: list[bool] = []
    for number, question in enumerate(QUESTIONS):
        picture = draw(200 + number)
        started = time.perf_counter()
        text = session.ask(question, [picture], temperature=0.0, max_new_tokens=MAX_NEW_TOKENS).text
        between = time.perf_counter()
        said, _ = peer.ask(question, [picture], MAX_NEW_TOKENS)
        ours, theirs = ours + between - started, theirs + time.perf_counter() - between
        same.append(text == said)
    return ours, theirs, same.index(False) if False in same else len(same)
