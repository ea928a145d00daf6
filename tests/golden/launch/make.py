"""Writes what the launchers' dry runs print: python tests/golden/launch/make.py, then look."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

from cases import CASES, GOLDEN, dry_run

for name in CASES:
    (GOLDEN / f"{name}.txt").write_text(dry_run(name), encoding="utf-8")
