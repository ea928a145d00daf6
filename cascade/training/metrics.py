"""Where a run's numbers and pictures go: TensorBoard, and a JSONL file beside it."""

import json
import pathlib

import jax
import numpy as np
from tensorboardX import SummaryWriter

# Dense bf16 (GPU: tensor-core) peak FLOP/s of one device, from the vendors' datasheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None where this kind of device isn't listed."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak and peak * jax.device_count()


class Metrics:
    """Writes scalars and pictures of one run; on processes other than 0 it writes nothing."""

    def __init__(self, workdir, start_step: int):
        """Opens `workdir/metrics.jsonl` and a TensorBoard file in `workdir/tensorboard`.

        Lines of steps after `start_step`, left by a run that was killed before it could
        checkpoint them, are dropped: they are about to be written again.
        """
        self.writes = jax.process_index() == 0
        if not self.writes:
            return
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= start_step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]):
        """Writes one row; values that aren't finite numbers are left out of it."""
        if not self.writes:
            return
        finite = {k: float(v) for k, v in values.items() if np.isfinite(v)}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()
        for name, value in finite.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray):
        """Writes a picture, uint8 [H, W, 3], to TensorBoard."""
        if self.writes:
            self.board.add_image(name, image, step, dataformats="HWC")

    def close(self):
        """Flushes and closes both files."""
        if self.writes:
            self.file.close()
            self.board.close()


def read(path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a last line cut short by a kill is passed over."""
    path = pathlib.Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
