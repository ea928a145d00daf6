"""What a cascade's pictures lose, and what time they save, in ever fewer steps.

    cascade distill --cascade --config configs/emoji/small_distill.py --workdir runs/small_few
    python bench/few_steps.py --run runs/small_few --config configs/emoji/small_sr.py

Of the base stage, captions of the training set are drawn by the teacher in 64, 32, … 1 steps of
DDIM and of DPM-Solver++(2M), and by every student that is there, all guided by the same weight, and
compared with the set's own pictures as `cascade evaluate` does. A super-resolution stage enlarges
the set's pictures, shrunk, in all the same ways from 32 steps on. Of the whole cascade the same is
done for the teachers in 50/30 steps and for students of 8/4; seconds a picture are of this one run,
the first batch, which compiles, left out. What is there already in `--out` is gone on with. Results
go to bench/results/, named after the stages' folders.

Whatever follows changes the config: --config.data.source.sources.singles.data_dir=elsewhere.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cascade.arguments import per_stage
from cascade.cli import OneSentence
from cascade.commands.parameters import Numbers
from cascade.errors import UserError
from cascade.evaluation.drawn import Drawing, Setting
from cascade.evaluation.evaluate import Against, score_drawings
from cascade.files import write_whole
from cascade.training.export import bundle_runs

RESULTS = Path(__file__).parent / "results"


@click.command(cls=OneSentence, context_settings={"ignore_unknown_options": True})
@click.option("--run", required=True, type=Path, help="What `cascade distill --cascade` left.")
@click.option("--config", required=True, help="Whose training pictures are drawn after.")
@click.option("--out", default="runs/few_steps", type=Path, show_default=True)
@click.option("--num", default=1000, show_default=True, help="Pictures of the base stage.")
@click.option("--whole", default=64, show_default=True, help="Pictures of each larger one.")
@click.option("--guidance", default=2.0, show_default=True, help="Of the base stage.")
@click.option("--sr-guidance", default=1.5, show_default=True, help="Of the other.")
@click.option(
    "--slow-steps", type=Numbers(int), default="50,30", show_default=True, help="Of the teachers."
)
@click.option(
    "--fast-steps", type=Numbers(int), default="8,4", show_default=True, help="Of the students."
)
@click.option("--name", default="few-steps", show_default=True, help="Of the results' files.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def main(
    run, config, out, num, whole, guidance, sr_guidance, slow_steps, fast_steps, name, overrides
):
    """Draws, scores and writes."""
    stages = sorted({path.parents[1] for path in run.glob("*/students/[0-9]*")}, key=side)
    if not stages:
        raise UserError(f"{run} holds no students; distil first.")
    base, *larger = stages
    weights = (guidance, *[sr_guidance] * len(larger))
    parts = [(base.name, num, of_one(base, guidance), None)]
    # Each bundle of `larger` holds one stage, number 0.
    parts += [(each.name, whole, of_one(each, sr_guidance), 0) for each in larger]
    if larger:
        slow_steps, fast_steps = (
            per_stage("--steps", x, len(stages)) for x in (slow_steps, fast_steps)
        )
        both = of_both(stages, out, weights, slow_steps, fast_steps)
        parts.append(("cascade", whole, both, None))
    found = {}
    for part, count, drawings, stage in parts:
        against = Against(config, out / part, "train", overrides)
        click.echo(score_drawings(against, drawings, num=count, stage=stage))
        found[part] = keep(out / part, f"{name}-{part}")
    figure = Figure(figsize=(6 * len(stages), 4), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        plot(axes, each.name, found[each.name])
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    seconds = [row["s/picture"] for row in found.get("cascade", [])[:2]]
    if seconds and None not in seconds:  # where all fits one batch, that compiled, there are none
        slow, fast = seconds
        steps = "/".join(map(str, fast_steps))
        found["times faster"] = slow / fast
        click.echo(f"In {steps} steps a picture takes {slow / fast:.1f} times less time.")
    write_whole(RESULTS / f"{name}.json", json.dumps(found, indent=1))


def side(stage: Path) -> int:
    """Of the pictures that a stage draws, pixels."""
    config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    return config["stage"]["resolution"]


def of_one(stage: Path, guidance: float) -> list[Drawing]:
    """Every way in which a stage is drawn with, the teacher's first."""
    learnt = [int(path.name) for path in (stage / "students").iterdir() if path.name.isdigit()]
    learnt = sorted(learnt, reverse=True)
    return [
        *(
            Drawing(stage / "teacher", Setting(guidance, steps, sampler), {"by": "teacher"})
            for sampler in ("ddim", "dpmpp_2m")
            for steps in (2 * learnt[0], *learnt)
        ),
        *(
            Drawing(
                stage / "students" / str(steps),
                Setting(guidance, steps, "ddim"),
                {"by": "student"},
            )
            for steps in learnt
        ),
    ]


def of_both(stages, out: Path, weights, slow_steps, fast_steps) -> list[Drawing]:
    """The teachers and two students, each bundled in `out`."""
    fast = [stage / "students" / str(n) for stage, n in zip(stages, fast_steps, strict=True)]
    bundle_runs([stage / "teacher" for stage in stages], out / "teachers", overwrite=True)
    bundle_runs(fast, out / "students", overwrite=True)
    return [
        Drawing(out / "teachers", Setting(weights, slow_steps, "ddim"), {"by": "teachers"}),
        Drawing(out / "students", Setting(weights, fast_steps, "ddim"), {"by": "students"}),
    ]


def keep(evaluation: Path, name: str) -> list[dict]:
    """Copies an evaluation's table and pictures to the results; returns the table's rows."""
    command = shlex.join(["python", "bench/few_steps.py", *sys.argv[1:]])
    table = (evaluation / "metrics.md").read_text(encoding="utf-8")
    write_whole(RESULTS / f"{name}.md", f"`{command}`\n\n{table}")
    shutil.copyfile(evaluation / "sheet.png", RESULTS / f"{name}.png")
    return json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))["rows"]


def plot(axes: Axes, stage: str, rows: list[dict]):
    """A stage's Fréchet distance over the number of steps, a line for each way to draw."""
    told = [row for row in rows if row.get("steps")]  # but for the real ones
    for artist, sampler in dict.fromkeys((row["by"], row["sampler"]) for row in told):
        line = [row for row in told if (row["by"], row["sampler"]) == (artist, sampler)]
        steps = [int(row["steps"]) for row in line]
        distances = [row["FID-EffLite0"] for row in line]
        axes.loglog(steps, distances, "o-", label=f"{artist}, {sampler}")
    ticks = sorted({int(row["steps"]) for row in told})
    axes.set_xticks(ticks, [*map(str, ticks)])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(stage)
    axes.set_xlabel("steps")
    axes.set_ylabel("FID-EffLite0")
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
