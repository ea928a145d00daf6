"""Does it matter that the frozen text encoder has learned a language? (Saharia et al. 2022)

    python bench/claims/language_model.py
    python bench/claims/language_model.py --steps 1500 --num 200     # on a CPU

Two base stages are trained alike on the states of a frozen MiniLM: one as it was trained, one with
random weights of the scale that BERTs are born with, which tells words apart but knows none. Both
draw captions of the training set, and new_words.tsv: things called by words that no caption holds
("a tomcat"), whose pictures should be nearest to the drawing of what is meant ("a cat").

Whatever follows changes the config: --config.data.source.data_dir=elsewhere.
"""

import csv
import shutil
from pathlib import Path

import click
import numpy as np
from experiment import Judge, cascade_of, pictures, report, trained
from safetensors.numpy import load_file, save_file

from cascade import config as configs
from cascade.text.bert import VENDORED

NEW_WORDS = Path(__file__).parent / "new_words.tsv"
SCALE = 0.02  # the standard deviation of BERT's weights at birth


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--config", default="configs/emoji/small_base.py", show_default=True)
@click.option("--steps", default=7500, show_default=True, help="Of training, each.")
@click.option("--num", default=1000, show_default=True, help="Pictures of each kind.")
@click.option("--out", default="runs/claims/language_model", type=Path, show_default=True)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(config, steps, num, out, overrides):
    """Trains, draws, compares."""
    loaded = configs.load(config, overrides)
    everything = pictures(loaded, loaded.stage.resolution, num)
    judge = Judge(everything)
    with open(NEW_WORDS, encoding="utf-8") as file:
        new = [row for row in csv.DictReader(file, delimiter="\t") if row["caption"] in judge.names]
    asked = {
        "captions": (everything.captions, everything.captions),
        "new words": ([row["prompt"] for row in new], [row["caption"] for row in new]),
    }
    rows = []
    for name, weights in {"learned": "", "random": str(unlearned(out / "encoder"))}.items():
        run = trained(config, out / name, overrides, train__steps=steps, text__weights=weights)
        pipe = cascade_of([run])
        for kind, (prompts, meant) in asked.items():
            images = pipe(prompts, seed=0)
            row = {"encoder": name, "prompts": kind, "pictures": len(images)}
            rows.append(row | judge(images, meant))
    report("language_model", rows, f"Base stages of {steps} steps each.")


def unlearned(folder: Path) -> Path:
    """MiniLM's folder with random matrices for learned ones; norms scale by 1 and shift by 0."""
    shutil.copytree(VENDORED, folder, dirs_exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = load_file(VENDORED / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        if "LayerNorm" in name:
            tensors[name] = np.full_like(tensor, name.endswith("weight"))
        elif tensor.ndim == 2:
            tensors[name] = rng.normal(0, SCALE, tensor.shape).astype(tensor.dtype)
        else:
            tensors[name] = np.zeros_like(tensor)
    save_file(tensors, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main()
