"""From features to the numbers that are reported."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cascade.evaluation.alignment import alignment
from cascade.evaluation.moments import Moments, few, frechet_distance, moments
from cascade.evaluation.neighbours import BLOCK, kernel_distance, precision_recall, radii
from cascade.evaluation.record import Record
from cascade.evaluation.retrieval import among, direction, ranks
from cascade.text.interface import TextEncoder

NEIGHBOURS = 3  # of precision and recall, as their authors choose
BEST = (1, 5)  # of retrieval


class Scored(NamedTuple):
    """One set of pictures to score.

    Attributes:
      about: what tells it from the others: {"guidance": "3", "steps": "50", "sampler": "ddim"}.
      record: its features.
      count: how many of the record's pictures, its first, are scored.
      prompts: what each picture was to show; empty where nothing tells.
      places: of each prompt, its record's place in the order of the source; empty likewise.
    """

    about: Mapping[str, str]
    record: Record
    count: int
    prompts: Sequence[str] = ()
    places: Sequence[int] = ()


class Known(NamedTuple):
    """Pictures whose captions are known: features [M, D] and the M captions."""

    features: np.ndarray
    captions: Sequence[str]


class Reference:
    """Real pictures' features [M, D], and what of them every comparison wants."""

    def __init__(self, features: np.ndarray, name: str):
        """Args: name: the extractor's, which is part of every number's."""
        self.features, self.name = features, name
        self.moments = in_blocks(features)

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """See `cascade.evaluation.neighbours.radii`."""
        return radii(self.features, NEIGHBOURS)

    def compare(self, drawn: np.ndarray) -> tuple[dict[str, float | None], str]:
        """Distances of drawn pictures' features [N, D] from these.

        Returns:
          {"FID-name", "KID-name", "KID-name error" (None of one subset), "precision-name",
          "recall-name"}, and a sentence where there are few pictures for the first, else "".

        Raises:
          UserError: fewer than four pictures on a side.
        """
        name, ours = self.name, in_blocks(drawn)
        precision, recall = precision_recall(drawn, self.features, NEIGHBOURS, self.radii)
        kernel = kernel_distance(drawn, self.features)
        found = {
            f"FID-{name}": frechet_distance(ours, self.moments),
            f"KID-{name}": kernel.value,
            f"KID-{name} error": kernel.error,
            f"precision-{name}": precision,
            f"recall-{name}": recall,
        }
        return found, few(ours, self.moments)

    def halves(self) -> dict[str, float | None]:
        """`compare` of one half of them with the other: what as few could reach."""
        middle = len(self.features) // 2
        first = Reference(self.features[:middle], self.name)
        return first.compare(self.features[middle : 2 * middle])[0]


def in_blocks(features: np.ndarray) -> Moments:
    """Moments of [N, D], with no more than a block of it in float64."""
    return moments(features[i : i + BLOCK] for i in range(0, len(features), BLOCK))


def fits(
    drawn: np.ndarray, prompts: Sequence[str], known: Known, encoder: TextEncoder
) -> dict[str, Any]:
    """Whether pictures show what their prompts say, by cosine among known pictures.

    Retrieval counts prompts that are the caption of a known picture, and no others.

    Returns:
      {"top-1", "top-5", "asked" (how many prompts these count), "names" (how many captions there
      are to be told from), "alignment", "alignment by chance"}; see `ranks` and `alignment`.
    """
    pictures, others = direction(drawn), direction(known.features)
    names = set(known.captions)
    asked = [i for i, prompt in enumerate(prompts) if prompt in names]
    found: dict[str, Any] = {"asked": len(asked), "names": len(names)}
    if asked:
        rank = ranks(pictures[asked], [prompts[i] for i in asked], others, known.captions)
        found |= {f"top-{k}": among(rank, k) for k in BEST if k < len(names)}
    fit = alignment(pictures, prompts, others, known.captions, encoder)
    return found | {"alignment": fit.value, "alignment by chance": fit.chance}


def score(
    sets: Sequence[Scored],
    references: Sequence[Reference],
    known: Known,
    encoder: TextEncoder,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every set's metrics, and of real pictures among themselves.

    Args:
      references: real pictures, one a network; retrieval is by the first's features.

    Returns:
      A row a set: what tells it, how many pictures it has, and metrics; a real row last. And
      sentences that a reader must know.

    Raises:
      UserError: too few pictures.
    """
    rows, notes = [], []
    for scored in tqdm(sets, "scores", disable=len(sets) < 3):
        measured = scored.record.read(scored.count)
        row = {**scored.about, "pictures": len(measured[references[0].name])}
        for reference in references:
            found, note = reference.compare(measured[reference.name])
            row |= found
            notes += [note] if note and note not in notes else []
        if scored.prompts and known.captions:
            row |= fits(measured[references[0].name], scored.prompts, known, encoder)
        if "seconds" in measured:
            row["s/picture"] = speed(measured["seconds"])
        rows.append(row)
    real = {name: "" for name in sets[0].about} | {next(iter(sets[0].about)): "real halves"}
    real["pictures"] = len(references[0].features) // 2
    for reference in references:
        real |= reference.halves()
    return [*rows, real], notes


def speed(seconds: np.ndarray) -> float | None:
    """Median seconds a picture; None where every batch compiled."""
    timed = seconds[np.isfinite(seconds)]
    return float(np.median(timed)) if len(timed) else None


def rounded(value: Any) -> str:
    """A number as tables show it."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells; a kernel distance stands with its standard error: "0.012 ± 0.001"."""
    heads = []
    for row in rows:
        heads += [head for head in row if head not in heads and not head.endswith(" error")]

    def cell(row, head):
        error = row.get(f"{head} error")
        return rounded(row.get(head)) + (f" ± {error:.1g}" if error is not None else "")

    return heads, [[cell(row, head) for head in heads] for row in rows]


def markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
