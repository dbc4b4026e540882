"""The demo model in torch, for training: MiniCPM-V-2.6's parts at small size, under the published tensor names.

vpm (SigLIP, NaViT style), resampler (queries over keys with 2-D sine positions) and llm (Qwen2, tied embedding).
Positions and patches come from mmchat.vision_inputs, so that training sees what the runtime will feed.  The runtime
itself never imports this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmchat.vision_inputs import position_ids, sincos_positions

Cache = list[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class DemoConfig:
    """Dimensions; the defaults are the shipped model's (3.3 million parameters)."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    rope_theta: float = 10000.0
    vision_hidden_size: int = 160
    vision_intermediate_size: int = 640
    vision_layers: int = 4
    vision_heads: int = 5
    query_num: int = 16
    resampler_heads: int = 8
    patch_size: int = 14
    position_side: int = 16

    @classmethod
    def of(cls, n_ids: int) -> DemoConfig:
        """For a tokenizer with so many ids; the table has rows for a multiple of 16."""
        return cls(vocab_size=-(-n_ids // 16) * 16)

    def published(self, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
        """config.json in the layout of the published checkpoint."""
        return {
            "architectures": ["MiniCPMV"],
            "model_type": "minicpmv",
            "version": 2.6,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float16",
            "query_num": self.query_num,
            "resampler_num_heads": self.resampler_heads,
            "image_size": 112,
            "patch_size": self.patch_size,
            "drop_vision_last_layer": False,
            "batch_vision_input": True,
            "slice_mode": True,
            "use_image_id": True,
            "slice_config": {"max_slice_nums": 9, "model_type": "minicpmv"},
            "vision_config": {
                "model_type": "siglip",
                "hidden_size": self.vision_hidden_size,
                "image_size": self.position_side * self.patch_size,
                "intermediate_size": self.vision_intermediate_size,
                "num_attention_heads": self.vision_heads,
                "num_hidden_layers": self.vision_layers,
                "patch_size": self.patch_size,
            },
        }


class VisionAttention(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (_heads(projection(x), self.n_heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).reshape(x.shape)))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class VisionLayer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        width = config.vision_hidden_size
        self.layer_norm1 = nn.LayerNorm(width, 1e-6)
        self.self_attn = VisionAttention(width, config.vision_heads)
        self.layer_norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = VisionMLP(width, config.vision_intermediate_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + cast(Tensor, self.mlp(self.layer_norm2(x)))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.vision_hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.position_side**2, config.vision_hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        flat = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        return flat + cast(Tensor, self.position_embedding(positions))


class VisionEncoder(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config) for _ in range(config.vision_layers)])


class VisionTower(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.vision_hidden_size, 1e-6)

    def forward(self, patches: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(patches, positions)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        return cast(Tensor, self.post_layernorm(x))


class Resampler(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.n_heads = config.resampler_heads
        self.query = nn.Parameter(torch.zeros(config.query_num, width))
        self.kv_proj = nn.Linear(config.vision_hidden_size, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.resampler_heads)
        self.ln_q = nn.LayerNorm(width, 1e-6)
        self.ln_kv = nn.LayerNorm(width, 1e-6)
        self.ln_post = nn.LayerNorm(width, 1e-6)
        self.proj = nn.Parameter(torch.randn(width, width) * 0.3 * width**-0.5)

    def forward(self, x: Tensor, sincos: Tensor, mask: Tensor) -> Tensor:
        """x: (views, patches, vision width); sincos: (views, patches, width).  Returns (views, query_num, width)."""
        x = self.ln_kv(self.kv_proj(x))
        weight_q, weight_k, weight_v = self.attn.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.attn.in_proj_bias.chunk(3)
        query = F.linear(self.ln_q(self.query), weight_q, bias_q)[None].expand(x.shape[0], -1, -1)
        key = F.linear(x + sincos, weight_k, bias_k)
        value = F.linear(x, weight_v, bias_v)
        q, k, v = (_heads(t, self.n_heads) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.attn.out_proj(out.transpose(1, 2).reshape(query.shape))
        return cast(Tensor, self.ln_post(out) @ self.proj)

    @torch.no_grad()
    def look_locally(self, side: int = 8) -> None:
        """Start with the queries as a square grid of soft windows over side x side patches.

        Head j compares positions by the j-th frequency of the sine table alone, horizontally and vertically, so a
        query holding the sines of its place attends around that place.
        """
        n_queries, width = self.query.shape
        n = math.isqrt(n_queries)
        quarter, head_width = width // 4, width // self.n_heads
        frequencies = [1.0 / 10000 ** (j / quarter) for j in range(self.n_heads)]
        weight = self.attn.in_proj_weight
        weight.normal_(std=0.05)
        weight[2 * width :].normal_(std=width**-0.5)
        self.attn.in_proj_bias.zero_()
        self.attn.out_proj.weight.copy_(torch.eye(width) + torch.randn(width, width) * 0.02)
        self.attn.out_proj.bias.zero_()
        self.query.zero_()
        used = [part * quarter + j for j in range(self.n_heads) for part in range(4)]
        unused = [i for i in range(width) if i not in set(used)]
        for i in range(n * n):
            y, x = ((place + 0.5) * side / n - 0.5 for place in divmod(i, n))
            for j, frequency in enumerate(frequencies):
                angles = (frequency * x, frequency * y)
                for axis, angle in enumerate(angles):
                    self.query[i, 2 * axis * quarter + j] = math.sin(angle)
                    self.query[i, (2 * axis + 1) * quarter + j] = math.cos(angle)
            self.query[i, unused] = -self.query[i, used].sum() / len(unused)
        for j in range(self.n_heads):
            for part in range(4):
                for offset in (0, width):
                    row = weight[offset + head_width * j + part]
                    row.zero_()
                    row[part * quarter + j] = 2.0
                self.ln_kv.weight[part * quarter + j] = 0.3


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class TextAttention(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        head = width // self.n_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, self.n_kv_heads * head)
        self.v_proj = nn.Linear(width, self.n_kv_heads * head)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.attend(x, cos, sin, past)
        return self.o_proj(attended), kept

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All but the output projection."""
        q = _rotate(_heads(self.q_proj(x), self.n_heads), cos, sin)
        k = _rotate(_heads(self.k_proj(x), self.n_kv_heads), cos, sin)
        v = _heads(self.v_proj(x), self.n_kv_heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        group = self.n_heads // self.n_kv_heads
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=past is None
        )
        return out.transpose(1, 2).reshape(x.shape), (k, v)


class TextMLP(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class TextLayer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = TextAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = TextMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept

    def of_rows(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor) -> Tensor:
        """Without a past; the rows `wanted` (flat indices) alone: (wanted, width)."""
        attended = self.self_attn.attend(self.input_layernorm(x), cos, sin, None)[0]
        kept = x.flatten(0, 1)[wanted] + self.self_attn.o_proj(attended.flatten(0, 1)[wanted])
        return cast(Tensor, kept + self.mlp(self.post_attention_layernorm(kept)))


class TextModel(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([TextLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Whole sequences at once: (batch, rows, width) to the same."""
        for layer in self.layers:
            x, _ = layer(x, cos, sin)
        return cast(Tensor, self.norm(x))

    def run_deep(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `run`, for rows `wanted` only (flat indices), after the states halfway and before the last layer.

        Returns (batch, rows, width) twice, then (wanted, width): nothing but its keys and values is computed for the
        other rows of the last layer.
        """
        half = x
        for i, layer in enumerate(self.layers[:-1]):
            x, _ = layer(x, cos, sin)
            half = x if i + 1 == len(self.layers) // 2 else half
        return half, x, cast(Tensor, self.norm(self.layers[-1].of_rows(x, cos, sin, wanted)))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        """Rows that continue what the cache holds; it is brought up to date in place."""
        for i, layer in enumerate(self.layers):
            x, cache[i] = layer(x, cos, sin, cache[i])
        return cast(Tensor, self.norm(x))


class TextTower(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.model = TextModel(config)


class DemoModel(nn.Module):
    """The three parts under the names of the published checkpoint; the output layer is the embedding (tied)."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.vpm = VisionTower(config)
        self.resampler = Resampler(config)
        self.llm = TextTower(config)
        self._initialise()

    def encode(self, patches: Tensor, positions: Tensor, sincos: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """patches: (views, patches, 3 * patch_size²).  Returns patch features and the rows the LLM reads."""
        features = self.vpm(patches, positions, mask)
        return features, self.resampler(features, sincos, mask)

    def embed(self, ids: Tensor, is_image: Tensor, image_rows: Tensor | None) -> Tensor:
        """Token rows with the image rows put in, in order, where is_image says."""
        rows = cast(Tensor, self.llm.model.embed_tokens(ids))
        return rows if image_rows is None else rows.masked_scatter(is_image[..., None], image_rows.to(rows.dtype))

    def rope(self, start: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (n, head width), of rows start to start + n."""
        return rope_table(self.config, start, n, like)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.llm.model.embed_tokens.weight)

    @torch.no_grad()
    def generate(self, rows: Tensor, stop_ids: frozenset[int], max_new_tokens: int = 96) -> list[int]:
        """Greedy answer to one prompt; rows: (1, n_rows, width).  The stop token is not in it."""
        cache: Cache = [None] * self.config.num_hidden_layers
        answer: list[int] = []
        position = 0
        while len(answer) < max_new_tokens:
            cos, sin = self.rope(position, rows.shape[1], rows)
            hidden = self.llm.model.step(rows, cos, sin, cache)
            position += rows.shape[1]
            chosen = int(self.logits(hidden[0, -1]).argmax())
            if chosen in stop_ids:
                break
            answer.append(chosen)
            rows = self.llm.model.embed_tokens(torch.tensor([[chosen]], device=rows.device))
        return answer

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * module.weight.shape[1] ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patch = self.vpm.embeddings.patch_embedding
        nn.init.normal_(patch.weight, std=patch.weight[0].numel() ** -0.5)
        if patch.bias is not None:
            nn.init.zeros_(patch.bias)
        nn.init.normal_(self.vpm.embeddings.position_embedding.weight, std=0.02)
        nn.init.normal_(self.llm.model.embed_tokens.weight, std=0.04)
        self.resampler.look_locally()


@lru_cache(maxsize=4096)
def _grid_tables(rows: int, columns: int, side: int, width: int) -> tuple[Tensor, Tensor]:
    positions = torch.from_numpy(position_ids(rows, columns, side))
    return positions, torch.from_numpy(sincos_positions(rows, columns, width))


def vision_inputs(
    config: DemoConfig, grids: Sequence[tuple[int, int]], n_patches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, sine table and mask of a padded batch of views; grids: (rows, columns) of patches of each."""
    n = len(grids)
    positions = torch.zeros(n, n_patches, dtype=torch.long)
    sincos = torch.zeros(n, n_patches, config.hidden_size)
    mask = torch.zeros(n, 1, 1, n_patches, dtype=torch.bool)
    for i, (rows, columns) in enumerate(grids):
        ids, table = _grid_tables(rows, columns, config.position_side, config.hidden_size)
        positions[i, : len(ids)] = ids
        sincos[i, : len(ids)] = table
        mask[i, :, :, : len(ids)] = True
    return positions, sincos, mask


def rope_table(config: DemoConfig, start: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    head = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** (-torch.arange(0, head, 2, dtype=torch.float32, device=like.device) / head)
    angles = torch.outer(torch.arange(start, start + n, dtype=torch.float32, device=like.device), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def save_both(
    model: DemoModel, out: Path, tokenizer_json: str, special: dict[str, int], weights: dict[str, Tensor]
) -> None:
    """out/model, which ships (float16), and out/model-float32, the same before rounding."""
    for name, dtype in (("model", torch.float16), ("model-float32", torch.float32)):
        save_folder(model, out / name, tokenizer_json, special, weights, dtype)


def save_folder(
    model: DemoModel,
    folder: Path,
    tokenizer_json: str,
    special: dict[str, int],
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """The model folder in the published layout; weights: other values than the model's own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = weights or model.state_dict()
    stored = {name: value.detach().cpu().to(dtype).contiguous() for name, value in state.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    end, end_of_text = special["<|im_end|>"], special["<|endoftext|>"]
    files: dict[str, dict[str, Any]] = {
        "config.json": model.config.published(end_of_text, end),
        "preprocessor_config.json": _PREPROCESSOR,
        "generation_config.json": {
            "bos_token_id": end_of_text,
            "eos_token_id": [end, end_of_text],
            "pad_token_id": end_of_text,
            "do_sample": False,
            "max_new_tokens": 128,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 112,
    "patch_size": 14,
    "use_image_id": True,
    "image_feature_size": 16,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
    "slice_mode": True,
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.6,
}


def _heads(x: Tensor, n_heads: int) -> Tensor:
    batch, rows, width = x.shape
    return x.view(batch, rows, n_heads, width // n_heads).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
