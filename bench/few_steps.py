"""What a cascade's pictures lose, and what time they save, in ever fewer steps.

    cascade distill --cascade --config configs/emoji/small_distill.py --workdir runs/small_few
    python bench/few_steps.py --run runs/small_few --config configs/emoji/small_sr.py

Of the base stage, captions of the training set are drawn by the teacher in 64, 32, … 1 steps of
DDIM and of DPM-Solver++(2M), and by every student, all guided by the same weight, and compared with
the set's own pictures by `cascade.evaluation`. Of the whole cascade the same is done for the
teacher in 50/30 steps and for students in 8/4; seconds a picture are of this one run, the first
batch, which compiles, left out. What is there already in `--out` is gone on with. Results go to
bench/results/.

Whatever follows changes the config: --config.data.eval_source.data_dir=elsewhere.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
from matplotlib.figure import Figure

from cascade.evaluation import drawn, scores
from cascade.evaluation.evaluate import Against, Job
from cascade.files import write_whole
from cascade.pipeline import load
from cascade.training.export import bundle_runs

RESULTS = Path(__file__).parent / "results"


class Drawing(NamedTuple):
    """Who draws, and how."""

    artist: str
    bundle: Path
    setting: drawn.Setting


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--run", required=True, type=Path, help="What `cascade distill --cascade` left.")
@click.option("--config", required=True, help="Whose training pictures are drawn after.")
@click.option("--out", default="runs/few_steps", type=Path, show_default=True)
@click.option("--num", default=1000, show_default=True, help="Pictures of the base stage.")
@click.option("--whole", default=64, show_default=True, help="Pictures of the cascade.")
@click.option("--guidance", default=2.0, show_default=True, help="Of the base stage.")
@click.option("--sr-guidance", default=1.5, show_default=True, help="Of the other.")
@click.option("--slow-steps", nargs=2, default=(50, 30), show_default=True, help="Of the teachers.")
@click.option("--fast-steps", nargs=2, default=(8, 4), show_default=True, help="Of the students.")
@click.option("--name", default="few-steps", show_default=True, help="Of the results' files.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(
    run, config, out, num, whole, guidance, sr_guidance, slow_steps, fast_steps, name, overrides
):
    """Draws, scores and writes."""
    base, sr = sorted(path.parent for path in run.glob("*/students"))
    against = Against(config, out / "base", "train", overrides)
    base_rows = scored(Job(against, num), base_drawings(base, guidance), num)
    bundles = {"teacher": [base / "teacher", sr / "teacher"]}
    bundles["students"] = [
        stage / "students" / str(steps) for stage, steps in zip((base, sr), fast_steps, strict=True)
    ]
    for artist, stages in bundles.items():
        bundle_runs(stages, out / artist, overwrite=True)
    weights = (guidance, sr_guidance)
    ways = [
        Drawing("teacher", out / "teacher", drawn.Setting(weights, slow_steps, "ddim")),
        Drawing("students", out / "students", drawn.Setting(weights, fast_steps, "ddim")),
    ]
    against = against._replace(out=out / "cascade")
    whole_rows = scored(Job(against, whole), ways, whole)
    slow, fast = (row["s/picture"] for row in whole_rows[:2])
    faster = slow / fast if slow and fast else None  # one batch alone has compiled in its time
    found = {"base": base_rows, "cascade": whole_rows, "times faster": faster}
    write_whole(RESULTS / f"{name}.json", json.dumps(found, indent=1))
    plot(base_rows).savefig(RESULTS / f"{name}.png", dpi=120)
    for part in ("base", "cascade"):
        shutil.copyfile(out / part / "metrics.md", RESULTS / f"{name}-{part}.md")
        shutil.copyfile(out / part / "sheet.png", RESULTS / f"{name}-{part}.png")
    if faster:
        click.echo(f"In {fast_steps} steps a picture takes {faster:.1f} times less time.")


def base_drawings(base: Path, guidance: float) -> Iterator[Drawing]:
    """Every way in which the base stage is drawn with, the teacher's first."""
    students = [path.name for path in (base / "students").iterdir() if path.name.isdigit()]
    learnt = sorted(map(int, students), reverse=True)
    for sampler, steps in itertools.product(("ddim", "dpmpp_2m"), (2 * learnt[0], *learnt)):
        yield Drawing("teacher", base / "teacher", drawn.Setting(guidance, steps, sampler))
    for steps in learnt:
        folder = base / "students" / str(steps)
        yield Drawing("student", folder, drawn.Setting(guidance, steps, "ddim"))


def scored(job: Job, drawings, num: int) -> list[dict]:
    """Draws in every way and scores all together; the rows of `metrics.json`."""
    drawings = list(drawings)
    loaded, sets = None, []
    for artist, bundle, setting in drawings:
        if bundle != loaded:
            loaded, pipe = bundle, load(bundle)
        if not sets:
            job.begin(pipe.stages[-1].config.resolution)
            places, prompts = zip(*itertools.islice(job.captions(), num), strict=True)
        about = {"by": artist, **setting.told(pipe)}
        digest = hashlib.sha256((bundle / "cascade.json").read_bytes()).hexdigest()
        record = job.record(
            "_".join(value.replace("/", "-") for value in about.values()),
            bundle=digest,
            source=job.data.about,
            seed=job.against.seed,
            stages=setting.stages(pipe),
        )
        of_job = (job.against.seed, None, job.resolution, job.extractors)
        drawn.measure(record, pipe, prompts, setting, *of_job, ", ".join(about.values()))
        sets.append(scores.Scored(about, record, num, prompts, places))
    click.echo(job.report(sets))
    return json.loads((job.out / "metrics.json").read_text())["rows"]


def plot(rows: list[dict]) -> Figure:
    """Fréchet distance over the number of steps, a line for each way to draw."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    told = [row for row in rows if row.get("steps")]  # but for the real ones
    for artist, sampler in dict.fromkeys((row["by"], row["sampler"]) for row in told):
        line = [row for row in told if (row["by"], row["sampler"]) == (artist, sampler)]
        steps = [int(row["steps"]) for row in line]
        distances = [row["FID-EffLite0"] for row in line]
        axes.loglog(steps, distances, "o-", base=2, label=f"{artist}, {sampler}")
    axes.set_xlabel("steps")
    axes.set_ylabel("FID-EffLite0")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
