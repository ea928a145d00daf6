"""Watches training and changes nothing: numbers, pictures, the progress bar's text."""

import contextlib
import functools
import math
import pathlib
import time

import jax
import numpy as np
from jax.sharding import Mesh

from cascade.errors import UserError
from cascade.images import contact_sheet, save_png, to_uint8
from cascade.parallel.mesh import (
    batch_sharding,
    batch_shares,
    replicated,
    split_rows,
    whole_on_host,
)
from cascade.stage import summarise
from cascade.training.metrics import Metrics, peak_flops


def due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 is never."""
    return every > 0 and step % every == 0


class Observer:
    """Logs, evaluates and samples at a run's intervals.

    Metrics stay on the device until they are logged, so that no step waits for the host.

    Args:
      task: what is learnt, a `cascade.training.loop.Task`.
      mesh: where the state lies. Of several processes, all observe together.
      put_batch: a batch of numpy arrays -> global arrays, captions' states among them.
      start: steps done before.
      evaluation: this process's held-out batches, as many as any other's.
    """

    def __init__(
        self, task, config, workdir, mesh: Mesh, put_batch, start: int, evaluation: list[dict]
    ):
        self.task, self.stage, self.settings = task, task.stage, config.train
        self.put_batch, self.mesh = put_batch, mesh
        self.workdir = pathlib.Path(workdir)
        self.metrics = Metrics(workdir, start)
        self.evaluation = evaluation
        loss = functools.partial(task.loss, train=False)
        self.evaluate = jax.jit(loss, out_shardings=replicated(mesh))
        # Training folds 1 into the seed's key; evaluation and samples have numbers of their own.
        seed = jax.random.key(config.seed)
        self.eval_key, self.sample_key = (jax.random.fold_in(seed, purpose) for purpose in (2, 3))
        self.pending, self.input_wait = [], 0.0
        self.since = None  # the first step compiles; the clock starts after it

    @contextlib.contextmanager
    def waiting_for_input(self):
        """Adds the time spent inside `with` to the input wait."""
        began = time.perf_counter()
        yield
        self.input_wait += time.perf_counter() - began

    def after_step(self, step: int, state, metrics, bar):
        """Keeps a step's metrics on the device, and at its intervals logs, evaluates, samples."""
        self.pending.append(metrics)
        if self.since is None:
            jax.block_until_ready(metrics)
            self._restart_clock()
        else:
            self.timed_steps += 1
        settings, last = self.settings, step == self.settings.steps
        if due(step, settings.log_every) or last:
            self._log(step, bar)
        if self.evaluation and (due(step, settings.eval_every) or (settings.eval_every and last)):
            self._evaluate(step, state)
        if self.evaluation and (
            due(step, settings.sample_every) or (settings.sample_every and last)
        ):
            self._sample(step, state)

    def check_finite(self, step: int, metrics):
        """Raises a UserError where a step's loss isn't a number, before it is saved for good."""
        if not np.isfinite(float(metrics["loss"])):
            raise UserError(
                f"The loss at step {step} is {float(metrics['loss'])}: training diverged; lower "
                "config.train.learning_rate.peak and start again from the last checkpoint."
            )

    def close(self):
        """Closes the metric files."""
        self.metrics.close()

    def _restart_clock(self):
        self.since, self.input_wait, self.timed_steps = time.perf_counter(), 0.0, 0

    def _log(self, step: int, bar):
        self.check_finite(step, self.pending[-1])  # the only wait for the device
        values = summarise(jax.device_get(self.pending))
        seconds = time.perf_counter() - self.since
        if self.timed_steps:
            pictures = self.timed_steps * self.settings.batch_size / seconds
            values["pictures_per_second"] = pictures
            values["flops_per_second"] = pictures * self.task.flops
            if peak_flops():
                values["flop_utilisation"] = values["flops_per_second"] / peak_flops()
            values["input_wait"] = self.input_wait / seconds
            bar.set_postfix(loss=f"{values['loss']:.4f}", pictures=f"{pictures:.0f}/s")
        self.metrics.scalars(step, values)
        self.pending = []
        self._restart_clock()

    def _evaluate(self, step: int, state):
        """Loss of the EMA weights on held-out data, with the same noise every time."""
        began = time.perf_counter()
        rows = [
            self.evaluate(
                state.ema_params,
                self.put_batch(batch),
                jax.random.fold_in(self.eval_key, index),
                *self.task.given(step - 1),
            )[1]
            for index, batch in enumerate(self.evaluation)
        ]
        values = summarise(jax.device_get(rows))
        self.metrics.scalars(step, {f"eval_{name}": value for name, value in values.items()})
        self.since += time.perf_counter() - began

    def _sample(self, step: int, state):
        """A sheet of samples beside the held-out pictures whose captions they were drawn from.

        They are drawn where the parameters lie, at least one on each device; the host gets those
        that are shown.
        """
        began = time.perf_counter()
        batch = self.put_batch(self.evaluation[0])
        count = min(self.settings.sample_count, len(batch["image"]))
        rows = math.ceil(count / batch_shares(self.mesh)) * batch_shares(self.mesh)
        split = functools.partial(split_rows, mesh=self.mesh)
        shown = {k: batch[k] for k in ("lowres", "image") if k in batch}
        cond = {k: batch[k] for k in ("text_emb", "text_mask", "lowres") if k in batch}
        cond = jax.device_put({k: v[:rows] for k, v in cond.items()}, batch_sharding(self.mesh))
        null = {
            k: split(np.broadcast_to(v, (rows, *v.shape))) for k, v in self.stage.null_cond.items()
        }
        keys = _keys(self.sample_key, split(np.arange(rows, dtype=np.uint32)))
        size = batch["image"].shape[1:3]
        shown["drawn"] = self.stage.draw(
            state.ema_params, cond, null, keys, self.stage.settings(), size
        )
        lines = [to_uint8(whole_on_host(pictures[:count])) for pictures in shown.values()]
        if self.metrics.writes:
            sheet = contact_sheet([picture for line in lines for picture in line], columns=count)
            self.metrics.picture(step, "samples", sheet)
            save_png(self.workdir / "samples" / f"{step:08d}.png", sheet)
        self.since += time.perf_counter() - began


@jax.jit
def _keys(key, indices):
    """One key a picture: fold_in(key, index)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
