"""Dynamic against static thresholding over guidance weights 1 … 15 (Saharia et al. 2022).

    python bench/claims/thresholding.py --base runs/small_base
    python bench/claims/thresholding.py --base runs/small_base --num 64 --steps 25   # on a CPU

The base stage draws the captions of single drawings with the same noise, clipped at [-1, 1] or at a
percentile of each picture's own values, which it is then divided by. The paper finds that dynamic
thresholding keeps pictures natural at high weights, where static ones saturate. Its plot has FID
over CLIP score; here it is over retrieval, the share of pictures nearest to the drawing that is
named, by features and by pixels.

Whatever follows changes the config: --config.seed=1.
"""

from experiment import RESULTS, Judge, cascade_of, check_side, command, pictures, report
from matplotlib.figure import Figure

from cascade import config as configs

WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0)
THRESHOLDS = {
    "static": {"name": "static"},
    "dynamic": {"name": "dynamic", "percentile": 99.5, "cap": 1e6},  # the paper's, uncapped
}


@command("configs/emoji/small_base.py", 30)
def main(base, config, steps, num, name, overrides):
    """Draws, compares, plots."""
    loaded = configs.load(config, overrides)
    pipes = {way: cascade_of([base], threshold=told) for way, told in THRESHOLDS.items()}
    check_side(pipes["static"], loaded.stage.resolution)
    real = pictures(loaded, loaded.stage.resolution, num, scenes=False)
    judge = Judge(real)
    rows = []
    for way, pipe in pipes.items():
        for weight in WEIGHTS:
            images = pipe(real.captions, steps=steps, guidance=weight, seed=loaded.seed)
            saturated = ((images == 0) | (images == 255)).mean()
            row = {"threshold": way, "guidance": weight, "pictures": len(images)}
            found = judge(images, real.captions)
            rows.append(row | found | {"saturated": saturated})
    report(name, rows, f"Drawn in {steps} steps.")
    plot(rows).savefig(RESULTS / f"{name}.png", dpi=120)


def plot(rows) -> Figure:
    """Distance over retrieval, a line for each way to clip, a point for each weight."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    parts = figure.subplots(1, 2, sharey=True)
    for axes, by in zip(parts, ("features", "pixels"), strict=True):
        for way in THRESHOLDS:
            line = [row for row in rows if row["threshold"] == way]
            x, y = [row[f"top-1, {by}"] for row in line], [row["FID-EffLite0"] for row in line]
            axes.plot(x, y, "o-", label=way)
            for row, *place in zip(line, x, y, strict=True):
                axes.annotate(f"{row['guidance']:g}", place, fontsize=7)
        axes.set_xlabel(f"top-1 retrieval by {by}")
    parts[0].set_ylabel("FID-EffLite0")
    parts[0].legend()
    return figure


if __name__ == "__main__":
    main()
