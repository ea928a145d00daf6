"""`cascade describe`: what stages are made of and what they cost, level by level."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from cascade.networks.cost import LevelCost
from cascade.networks.cost import describe as level_costs
from cascade.stage import Stage


def describe(configs: Mapping[str | None, ConfigDict]) -> str:
    """A stage's table and cost; or each stage's of a cascade, by name, and what they sum to.

    Args:
      configs: what `cascade.config.load_stages` gives.
    """
    stages = {name: Stage(config.stage) for name, config in configs.items()}
    costs = {name: level_costs(stage.network, *stage.shapes(1)) for name, stage in stages.items()}
    parts = []
    for name, stage in stages.items():
        title = [f"{name}, {_size(stage.config.resolution)}"] if name else []
        parts.append("\n".join([*title, table(costs[name]), training(stage, costs[name])]))
    if None not in configs:
        parameters = sum(row.parameters for rows in costs.values() for row in rows)
        flops = sum(row.flops for rows in costs.values() for row in rows)
        drawing = sum(drawn_flops(stage) for stage in stages.values())
        parts.append(
            f"All stages have {parameters:,} parameters. A training picture of each takes "
            f"{_flops(3 * flops)}, one evaluation of each at the size it draws {_flops(drawing)}."
        )
    return "\n\n".join(parts)


def table(rows: list[LevelCost]) -> str:
    """Resolution, channels, parameters and forward FLOPs of every level.

    FLOPs are those of one picture at the training resolution, padding taps included.
    """
    lines = [f"{'level':<10}{'height×width':>14}{'channels':>10}{'parameters':>16}{'GFLOP':>12}"]
    for row in rows:
        size = _size(row.height, row.width)
        lines.append(
            f"{row.level:<10}{size:>14}{row.channels:>10}{row.parameters:>16,}"
            f"{row.flops / 1e9:>12.3f}"
        )
    parameters, flops = (sum(getattr(row, key) for row in rows) for key in ("parameters", "flops"))
    lines.append(f"{'all':<34}{parameters:>16,}{flops / 1e9:>12.3f}")
    return "\n".join(lines)


def training(stage: Stage, rows: list[LevelCost]) -> str:
    """The sentence on a training step, about three forward passes; for crops, on drawing too."""
    flops = sum(row.flops for row in rows)
    side, resolution = stage.training_resolution, stage.config.resolution
    crop = "" if side == resolution else f", a crop of {_size(side)}"
    said = f"Training takes {_flops(3 * flops)} a picture{crop} (3 × forward)."
    if crop:
        said += f" One evaluation at {_size(resolution)} takes {_flops(drawn_flops(stage))}."
    return said


def drawn_flops(stage: Stage) -> float:
    """Forward FLOPs of one picture at the resolution that the stage draws."""
    rows = level_costs(stage.network, *stage.shapes(1, (stage.config.resolution,) * 2))
    return sum(row.flops for row in rows)


def _size(height: int, width: int | None = None) -> str:
    return f"{height}×{width or height}"


def _flops(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP" if flops < 1e12 else f"{flops / 1e12:,.2f} TFLOP"
