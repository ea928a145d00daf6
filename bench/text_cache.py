"""Size and error of the embedding cache's dtypes against float32.

    python bench/text_cache.py               # minutes on two CPU cores
    python bench/text_cache.py --every 1

First every fourth of the emoji set's 38,974 captions, through the packaged MiniLM. Then states that
are drawn, not any T5's: as wide as T5-XXL's (D = 4096), from Student's t with 4 degrees of freedom,
and 4 channels 20 times as wide as the rest. Such channels are hard on int8 with one scale a token;
a real T5's error is left to be measured by whoever has its weights: `cascade embed` prints it.
Results go to bench/results/.
"""

import json
import platform
import tempfile
from hashlib import sha256
from pathlib import Path

import click
import jax
import numpy as np

from cascade.data.emoji.builder import DEFAULTS as VARIANTS
from cascade.data.emoji.builder import Single, phrases_of, plan
from cascade.data.emoji.captions import single_captions
from cascade.data.emoji.drawings import ideas
from cascade.data.emoji.scenes import scene_captions
from cascade.text.cache import EmbeddingCache
from cascade.text.encoders import TextEncoder, Tokens, minilm
from cascade.text.segment import DTYPES

LENGTH = 48  # configs/emoji's
COMPARED = 1000  # captions whose tokens are looked at one by one
SEED = 0


class Drawn(TextEncoder):
    """A token a word, and states from a heavy-tailed distribution with a few outlying channels."""

    name, width, max_length = "drawn", 4096, LENGTH

    @property
    def fingerprint(self) -> str:
        """Of the recipe."""
        return sha256(b"Student's t, 4 degrees; 4 of 4096 channels times 20").hexdigest()

    def tokenize(self, prompts) -> Tokens:
        """Ids are digests of words."""
        shape = (len(prompts), LENGTH)
        tokens = Tokens(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[0], bool))
        for row, prompt in enumerate(prompts):
            for i, word in enumerate(prompt.split()[:LENGTH]):
                tokens.ids[row, i] = int.from_bytes(sha256(word.encode()).digest()[:3])
                tokens.mask[row, i] = True
        return tokens

    def embed(self, ids, mask):
        """Draws each state with its token's id and position as seed."""
        states = np.zeros((*ids.shape, self.width), np.float32)
        for row, i in np.argwhere(mask):
            rng = np.random.default_rng([SEED, ids[row, i], i])
            states[row, i] = rng.standard_t(4, self.width)
        states[..., :4] *= 20
        return states

    def null(self):
        """Zeros."""
        return np.zeros((LENGTH, self.width), np.float32), np.zeros(LENGTH, bool)

    def save_tokenizer(self, folder):
        """There is none."""
        return []


def emoji_captions() -> list[str]:
    """Every distinct caption of the full emoji set, as `cascade data build emoji` writes them."""
    phrases, captions = phrases_of("full"), {}
    for item in [item for split in plan(VARIANTS["full"]).values() for item in split]:
        shows = item.shows
        if isinstance(shows, Single):
            idea = ideas()[shows.hexcode]
            texts = single_captions(idea, shows.style, phrases[shows.hexcode])
        else:
            texts = scene_captions(shows, phrases)
        captions.update(dict.fromkeys(texts))
    return list(captions)


def measure(encoder: TextEncoder, captions: list[str], dtype: str) -> dict:
    """Builds a cache of one dtype and holds it against the encoder's own states."""
    sample = captions[:: -(-len(captions) // COMPARED)]
    exact, mask = encoder.encode(sample)
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(folder, encoder, dtype)
        added = cache.ensure(captions)
        stored = cache.lookup(sample)["text_emb"]
        size, tokens = cache.bytes, cache.tokens
    difference, exact = (stored - exact)[mask], exact[mask]
    by_token = np.linalg.norm(difference, axis=1) / np.linalg.norm(exact, axis=1)
    return {
        "dtype": dtype,
        "captions": len(captions),
        "tokens": tokens,
        "mib": size / 2**20,
        "of_float32": size / (tokens * encoder.width * 4),
        "of_padded_float32": size / (len(captions) * encoder.max_length * encoder.width * 4),
        "relative_error": added.error,
        "worst_token": float(by_token.max()),
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    names = "| states | dtype | captions | tokens | MiB | of float32, trimmed | of float32, padded "
    names += "| relative error | of the worst token |"
    lines = [names, "|---" * 9 + "|"]
    for row in rows:
        lines.append(
            f"| {row['states']} | {row['dtype']} | {row['captions']:,} | {row['tokens']:,} "
            f"| {row['mib']:,.1f} | {row['of_float32']:.3f} | {row['of_padded_float32']:.3f} "
            f"| {row['relative_error']:.2g} | {row['worst_token']:.2g} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--every", default=4, show_default=True, help="Of the emoji captions; 1 is all.")
@click.option("--drawn", default=1000, show_default=True, help="Captions with drawn states.")
@click.option("--out", default=Path(__file__).parent / "results", type=click.Path(path_type=Path))
def main(every, drawn, out):
    """Measures, prints and writes."""
    captions = emoji_captions()
    jobs = [
        (
            f"MiniLM, D = 384, L = {LENGTH}",
            minilm(max_length=LENGTH, weights=""),
            captions[::every],
        ),
        (f"drawn, D = {Drawn.width:,}, L = {LENGTH}", Drawn(), captions[:drawn]),
    ]
    rows = [
        {"states": states, **measure(encoder, texts, dtype)}
        for states, encoder, texts in jobs
        for dtype in DTYPES
    ]
    command = f"python bench/text_cache.py --every {every} --drawn {drawn}"
    where = f"{jax.default_backend()}, {platform.machine()}"
    versions = f"python {platform.python_version()}, jax {jax.__version__}"
    text = f"`{command}` on {where}; {versions}\n\n{table(rows)}\n"
    out.mkdir(parents=True, exist_ok=True)
    facts = {"command": command, "where": where, "versions": versions, "rows": rows}
    (out / "text_cache.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "text_cache.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
