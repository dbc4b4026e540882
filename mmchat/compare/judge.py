"""CLIPScore: how well an answer goes with its picture, by a CLIP model that the user brings.

100 times the cosine of the two embeddings, at least 0 (Hessel and others, 2021, without their factor 2.5).  A text is
cut after as many tokens as the model takes, mostly 77.  Needs torch and transformers, which mmchat does not bring; the
folder is one of CLIPModel: config.json, preprocessor_config.json, tokenizer.json and the weights.  Tried with random
weights only: that the figures of trained ones are those of other programs is not known here.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmchat.errors import ModelDirError
from mmchat.images import read_image


class ClipJudge:
    """A CLIP model on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelDirError: packages or files missing, or not a CLIP model."""
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ModelDirError(f"--judge clip needs the package {package}: pip install torch transformers")
        needed = ("config.json", "preprocessor_config.json", "tokenizer.json")
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise ModelDirError(
                f"{folder}: lacks {', '.join(missing)}; give the folder of a CLIP model, such as "
                "openai/clip-vit-large-patch14 from the hub"
            )
        from tokenizers import Tokenizer

        self._torch: Any = importlib.import_module("torch")
        try:
            processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            clip: Any = importlib.import_module("transformers").CLIPModel
            self._model = clip.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(int(self._model.config.text_config.max_position_embeddings))
            self._side = int(self._model.config.vision_config.image_size)
            self._mean, self._std = (np.array(processor[name], np.float32) for name in ("image_mean", "image_std"))
        except Exception as error:  # whatever these libraries raise
            said = " ".join(str(error).split())[:300]
            raise ModelDirError(f"{folder}: not a CLIP model that transformers opens ({said})") from None

    def score(self, picture: Path, text: str) -> float:
        """See Judge.score; 0 for no text."""
        ids = self._tokenizer.encode(text).ids
        if not text.strip() or not ids:
            return 0.0
        torch = self._torch
        with torch.no_grad():
            out = self._model(
                input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(self._pixels(read_image(picture)))
            )
        a, b = (one[0].double().numpy() for one in (out.image_embeds, out.text_embeds))
        return max(0.0, 100 * float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        """(1, 3, side, side): the shorter side scaled, the middle cut out."""
        scale = self._side / min(image.size)
        width, height = (max(self._side, round(side * scale)) for side in image.size)
        scaled = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self._side) // 2, (height - self._side) // 2
        cut = np.asarray(scaled.crop((left, top, left + self._side, top + self._side)), np.float32) / 255
        return np.ascontiguousarray(((cut - self._mean) / self._std).transpose(2, 0, 1)[None])
