"""What two models' embeddings and answers have in common, as numbers.  Nothing is known here of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Said:
    """A model's answer.

    ids: its tokens.  seconds: with encoding, except where it was given another encoder's rows.  judged: the judge's
    score, where there is one.
    """

    text: str
    ids: tuple[int, ...]
    seconds: float
    judged: float | None = None


@dataclass(frozen=True)
class Slices:
    """Of the encoder inputs of one picture, in their order: cosine of the two embeddings, and their largest difference.

    None where the models cut the picture differently, or their embeddings have another size.
    """

    cosines: tuple[float, ...] | None
    max_errors: tuple[float, ...] | None


@dataclass(frozen=True)
class Answers:
    """agreement: share of equal tokens, position by position, of the longer answer; diverges_at: the first position
    that differs (from 0), None where none does; both None where the models have different tokens.  similarity: of the
    texts, from 0 to 1 (difflib's ratio).
    """

    a: Said
    b: Said
    agreement: float | None
    diverges_at: int | None
    similarity: float

    @property
    def same(self) -> bool:
        return self.a.text == self.b.text


@dataclass(frozen=True)
class Compared:
    """One picture and one question; without answers where encoders were compared."""

    picture: str
    question: str
    slices: Slices
    answers: Answers | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_slices(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> Slices:
    """Embeddings (rows, width) of the same picture."""
    if len(a) != len(b) or any(one.shape != other.shape for one, other in zip(a, b, strict=True)):
        return Slices(None, None)
    pairs = [(one.astype(np.float64), other.astype(np.float64)) for one, other in zip(a, b, strict=True)]
    return Slices(
        tuple(cosine(one, other) for one, other in pairs),
        tuple(float(np.abs(one - other).max()) for one, other in pairs),
    )


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of all numbers of both; 1 for two that are zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / norms if norms else float(np.array_equal(a, b))


def compare_answers(a: Said, b: Said, *, same_tokens: bool) -> Answers:
    """same_tokens: whether a token's number means the same to both."""
    similarity = SequenceMatcher(None, a.text, b.text, autojunk=False).ratio()
    if not same_tokens:
        return Answers(a, b, None, None, similarity)
    longer, shorter = max(len(a.ids), len(b.ids)), min(len(a.ids), len(b.ids))
    equal = [one == other for one, other in zip(a.ids, b.ids, strict=False)]
    diverges_at = equal.index(False) if False in equal else shorter if shorter < longer else None
    return Answers(a, b, sum(equal) / longer if longer else 1.0, diverges_at, similarity)


def summary(found: Sequence[Compared]) -> dict[str, Any]:
    """Over all pictures and questions; each picture's slices count once."""
    slices = list({one.picture: one.slices for one in found}.values())
    cosines = [value for one in slices for value in one.cosines or ()]
    answers = [one.answers for one in found if one.answers is not None]
    agreements = [one.agreement for one in answers if one.agreement is not None]
    starts = [one.diverges_at for one in answers if one.diverges_at is not None]
    judged = [(one.a.judged, one.b.judged) for one in answers]
    scores = [(a, b) for a, b in judged if a is not None and b is not None]
    return {
        "pictures": len(slices),
        "questions": len({one.question for one in found if one.answers}),
        "slices": len(cosines),
        "cut_differently": sum(one.cosines is None for one in slices),
        "least_cosine": min(cosines, default=None),
        "mean_cosine": _mean(cosines),
        "max_error": max((value for one in slices for value in one.max_errors or ()), default=None),
        "same_answers": sum(one.same for one in answers),
        "answers": len(answers),
        "mean_agreement": _mean(agreements),
        "first_divergence": min(starts, default=None),
        "mean_similarity": _mean([one.similarity for one in answers]),
        "judged_a": _mean([a for a, _ in scores]),
        "judged_b": _mean([b for _, b in scores]),
        "seconds_a": sum(one.a.seconds for one in answers),
        "seconds_b": sum(one.b.seconds for one in answers),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
