"""Does it matter that the frozen text encoder has learned a language? (Saharia et al. 2022)

    python bench/claims/language_model.py
    python bench/claims/language_model.py --config configs/emoji/demo_base.py --steps 600    # a CPU

Two base stages are trained alike on the states of a frozen MiniLM: one as it was trained, one with
random weights of the scale that BERTs are born with, which tells words apart but knows none. Both
draw captions of the training set, and new_words.tsv: things called by words that no caption holds
("a tomcat"), whose pictures should be nearest to the drawing of what is meant ("a cat").

The second takes the demo's drawings: `cascade data build emoji --variant demo --out data/emoji`.

Whatever follows changes the config: --config.seed=1.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
from experiment import Judge, cascade_of, command, pictures, report, trained
from safetensors.numpy import load_file, save_file

from cascade import config as configs
from cascade.files import check_writable
from cascade.text.bert import VENDORED

NEW_WORDS = Path(__file__).parent / "new_words.tsv"
SCALE = 0.02  # the standard deviation of BERT's weights at birth


@command("configs/emoji/small_base.py", 7500, base=False, out="runs/claims/language_model")
def main(config, steps, num, name, out, overrides):
    """Trains, draws, compares."""
    loaded = configs.load(config, overrides)
    check_writable(out, "claim in")
    known = pictures(loaded, loaded.stage.resolution, num, scenes=False)
    judge = Judge(known)
    with open(NEW_WORDS, encoding="utf-8") as file:
        new = [row for row in csv.DictReader(file, delimiter="\t") if row["caption"] in judge.names]
    asked = {
        "captions": (known.captions, known.captions),
        "new words": ([row["prompt"] for row in new], [row["caption"] for row in new]),
    }
    rows = []
    for encoder, weights in {"learned": "", "random": str(unlearned(out / "encoder"))}.items():
        run = trained(config, out / encoder, overrides, train__steps=steps, text__weights=weights)
        pipe = cascade_of([run])
        for kind, (prompts, meant) in asked.items():
            if not prompts:  # of such pictures the list knows no other words
                continue
            images = pipe(prompts, seed=loaded.seed)
            row = {"encoder": encoder, "prompts": kind, "pictures": len(images)}
            rows.append(row | judge(images, meant))
    report(name, rows, f"Base stages of {steps} steps each.")


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
