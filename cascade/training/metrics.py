"""Where a run's numbers and pictures go: TensorBoard, and a JSONL file beside it."""

import contextlib
import json
import logging
import pathlib

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.writer import DummyFileWriter

from cascade.errors import UserError
from cascade.files import write_whole

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
        text = "".join(json.dumps(row) + "\n" for row in kept)
        try:
            write_whole(self.path, text)
            self.file = self.path.open("a", encoding="utf-8")
            self.board = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=start_step + 1
            )
        except OSError as error:
            raise UserError(
                f"Can't write metrics in {workdir} ({error}); free the place or give another "
                "--workdir."
            ) from error

    def scalars(self, step: int, values: dict[str, float]):
        """Writes one row; values that aren't finite numbers are left out of it."""
        if not self.writes:
            return
        finite = {k: float(v) for k, v in values.items() if np.isfinite(v)}
        try:
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"Can't write to {self.path} ({error.strerror}); free some space and run the same "
                "command to go on from the last checkpoint."
            ) from error
        with self._dispensable():
            for name, value in finite.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray):
        """Writes a picture, uint8 [H, W, 3], to TensorBoard."""
        if self.writes:
            with self._dispensable():
                self.board.add_image(name, image, step, dataformats="HWC")

    def close(self):
        """Flushes and closes both files."""
        if not self.writes:
            return
        self.file.close()
        with self._dispensable():
            self.board.close()

    @contextlib.contextmanager
    def _dispensable(self):
        """Lets nothing of TensorBoard end a run: `metrics.jsonl` has all of its numbers."""
        try:
            yield
        except OSError as error:
            logging.warning("TensorBoard's file isn't whole (%s).", error.strerror)
            # It would try again at the program's exit, and its thread read on, with stack traces.
            writer = self.board.file_writer
            writer.event_writer._worker.stop()
            writer.event_writer = DummyFileWriter("")


def read(path) -> list[dict]:
    """The rows of a `metrics.jsonl`. Lines that aren't rows are passed over, with a warning.

    A last line may be cut short by a kill; that is passed over in silence.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no object with a step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                logging.warning("%s, line %d, is passed over (%s).", path, number, error)
    return rows
