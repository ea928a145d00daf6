"""`cascade describe`: what a stage is made of and what it costs, level by level."""

from cascade.networks.cost import describe as level_costs
from cascade.stage import Stage


def describe(stage: Stage) -> str:
    """A table of resolution, channels, parameters and forward FLOPs of every level.

    FLOPs are those of one picture at the training resolution, padding taps included; a training
    step takes about three times the forward pass.
    """
    rows = level_costs(stage.network, *stage.shapes(1))
    parameters, flops = (sum(getattr(row, key) for row in rows) for key in ("parameters", "flops"))
    lines = [f"{'level':<10}{'height×width':>14}{'channels':>10}{'parameters':>14}{'GFLOP':>12}"]
    for row in rows:
        size = f"{row.height}×{row.width}"
        lines.append(
            f"{row.level:<10}{size:>14}{row.channels:>10}{row.parameters:>14,}"
            f"{row.flops / 1e9:>12.3f}"
        )
    lines.append(f"{'all':<34}{parameters:>14,}{flops / 1e9:>12.3f}")
    lines.append(f"Training takes {3 * flops / 1e9:,.1f} GFLOP a picture (3 × forward).")
    return "\n".join(lines)
