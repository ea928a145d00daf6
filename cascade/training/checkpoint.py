"""Training checkpoints: state, data position, config and a checksum, kept by Orbax.

Orbax writes to a temporary folder and renames it when whole, so a killed run leaves the previous
checkpoint as it was. It doesn't notice a flipped bit and has no way back from an unreadable
folder; the checksum and `restore` here add both.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import sys

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cascade.errors import UserError
from cascade.parallel.mesh import first_failing
from cascade.signals import interrupt_in

FORMAT_VERSION = 2
AVERAGED = (1, 2)  # of 1 the averages are the same, and the data positions others

# What a failed write raises: the file system's error, or TensorStore's wrapping of it.
UNWRITTEN = (ValueError, OSError, RuntimeError)
# What is raised in reading without a fault of the checkpoint's.
UNDAMAGED = (UserError, MemoryError, jax.errors.JaxRuntimeError)


def checksum(tree) -> int:
    """Sum of all bit patterns mod 2³²: the same on any mesh, changed by any one flipped bit.

    Taken on the host, from each shard once: there is nothing to compile, and a checkpoint copies
    the arrays there anyway.
    """
    total = np.zeros((), np.uint64)
    for leaf in jax.tree.leaves(tree):
        for part in _own_parts(leaf):
            words = np.asarray(part).view(f"uint{8 * leaf.dtype.itemsize}")
            total += words.sum(dtype=np.uint64)
    if jax.process_count() > 1:
        total = multihost_utils.process_allgather(total.astype(np.uint32)).sum(dtype=np.uint64)
    return int(total % 2**32)


def checksums(state) -> dict[str, int]:
    """The checksum of each of a state's parts, by name; the whole's is their sum mod 2³²."""
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts.setdefault(jax.tree_util.keystr(path[:1], simple=True), []).append(leaf)
    return {name: checksum(leaves) for name, leaves in parts.items()}


def check_sum(tree, saved: int):
    """Raises a ValueError unless a tree's checksum is what was saved."""
    if checksum(tree) != saved:
        raise ValueError("its checksum doesn't match its contents")


def _own_parts(leaf):
    """What a process has of an array, each element on one process only."""
    if isinstance(leaf, jax.Array):
        return [shard.data for shard in leaf.addressable_shards if shard.replica_id == 0]
    return [leaf]


def everywhere(read):
    """What `read` gives here, once it is read on every process.

    A checkpoint may be damaged in a part that one process alone reads, and all must go back from
    it. So `read` itself waits for no other process.

    Raises:
      Exception: what `read` raises, or a ValueError where it failed on another process.
    """
    result = failure = None
    try:
        result = read()
    except UNDAMAGED:
        raise  # ends this process, and thereby the others
    except Exception as error:
        if interrupt_in(error) is not None:
            raise
        failure = error
    process = first_failing(failure is not None)
    if failure is None and process is not None:
        failure = ValueError(f"process {process} can't read it")
    if failure is not None:
        raise failure
    return result


def ignore_late_callbacks():
    """Keeps quiet what TensorStore prints once a save has failed.

    Its other writes still call into Orbax's event loop, closed by then, and each of thousands
    prints a traceback; the failure itself reaches `Checkpoints.save` or `wait`.
    """
    shown = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one working folder."""

    def __init__(self, workdir, *, keep_last: int = 1, keep_every: int = 0, read_only=False):
        """Opens (and makes) `workdir/checkpoints`.

        Args:
          keep_last: how many of the newest to keep.
          keep_every: also keep those whose step is a multiple of this; 0 = none.
          read_only: change nothing in the folder, which a training may be writing to.

        Raises:
          UserError: the folder can't be made.
        """
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.read_only = read_only
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Can't make {self.folder} ({error.strerror}); give another --workdir."
            ) from error
        if not read_only:
            ignore_late_callbacks()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep_last,
            keep_period=keep_every or None,
            enable_async_checkpointing=not read_only,
            read_only=read_only,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, iterator, config: dict, text_fingerprint: str = ""):
        """Starts writing a checkpoint and returns once the arrays have been copied.

        Args:
          iterator: the Grain iterator whose position is saved, each process its own.
          config: JSON-able.
          text_fingerprint: of the encoder whose states it was trained on; "" where there is none.

        Raises:
          UserError: this or the previous checkpoint couldn't be written; older ones stay good.
        """
        sums = checksums(state)
        meta = {
            "format_version": FORMAT_VERSION,
            "config": config,
            "text_fingerprint": text_fingerprint,
            "checksum": sum(sums.values()) % 2**32,
            "checksums": sums,
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self.manager.save(step, args=items)
        except UNWRITTEN as error:
            raise self._unwritten(error) from error

    def wait(self):
        """Waits until the checkpoint in flight is on disk; raises as `save` does."""
        try:
            self.manager.wait_until_finished()
        except UNWRITTEN as error:
            raise self._unwritten(error) from error

    def close(self):
        """Waits, then frees Orbax's threads."""
        self.wait()
        self.manager.close()

    def latest(self) -> int | None:
        """The newest step that is on disk once the one in flight is, or None."""
        self.wait()
        return max(self.manager.all_steps(read=True), default=None)

    def newest_meta(self) -> tuple[dict, int] | None:
        """(meta, step) of the newest checkpoint whose meta can be read, or None."""
        for step in sorted(self.manager.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # `restore` says what is wrong with it
                return self._meta(step, (FORMAT_VERSION,)), step
        return None

    def restore(self, abstract_state, iterator=None, check=lambda meta, step: None):
        """The newest checkpoint that is whole, or None where there is none.

        Damaged ones newer than it are said to be so and, unless this is read-only, set aside as
        `checkpoints.broken/STEP`. Where none is whole, nothing is moved.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings: where each array goes.
          iterator: a Grain iterator to move to the saved position; where several processes saved
            theirs, its `set_state` is given the list.
          check: called with a checkpoint's meta and step before its arrays are read; raises a
            UserError where they are another run's.

        Returns:
          (step, state, meta) or None; meta has `config` and `text_fingerprint` as they were saved.

        Raises:
          UserError: `check`'s, or there are checkpoints but none is whole.
        """

        def read(step: int, meta: dict):
            check(meta, step)
            return self._state(step, meta, abstract_state, iterator)

        return self._newest_whole(read, (FORMAT_VERSION,))

    def restore_ema(self, abstract_state):
        """The averaged parameters of the newest checkpoint that is whole, or None; on one process.

        They are read to this host, whatever mesh they were on, and nothing else is: a quarter of
        the state. Of a checkpoint by a version that gave only the whole state a checksum, all is.

        Args:
          abstract_state: as in `restore`; shardings don't matter.

        Returns:
          (step, tree of numpy arrays, meta) or None.

        Raises:
          UserError: there are checkpoints but none is whole.
        """

        def read(step: int, meta: dict):
            alone = "checksums" in meta
            fields = [field.name for field in dataclasses.fields(abstract_state)]
            item = {k: getattr(abstract_state, k) for k in (["ema_params"] if alone else fields)}
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            wanted = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
            state = self.manager.restore(step, args=ocp.args.Composite(state=wanted)).state
            check_sum(state, meta["checksums"]["ema_params"] if alone else meta["checksum"])
            return state["ema_params"]

        return self._newest_whole(read, AVERAGED)

    def _newest_whole(self, read, formats):
        """(step, read(step, meta), meta) of the newest checkpoint that `read` can read, or None."""
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                meta = everywhere(functools.partial(self._meta, step, formats))
                state = read(step, meta)
            except UNDAMAGED:
                raise
            except Exception as error:  # Orbax raises that very class where data is missing
                if interrupt_in(error) is not None:  # and where Ctrl-C finds it
                    raise
                damaged.append((step, error))
                if step == min(self.manager.all_steps()):
                    raise UserError(
                        f"None of the {len(damaged)} checkpoints in {self.folder} can be read "
                        f"({first_line(error)}); restore one, or move that folder away to start "
                        "anew."
                    ) from error
                continue
            for broken, error in damaged:
                logging.warning(
                    "Checkpoint %d is damaged (%s); went back to %d.",
                    broken,
                    first_line(error),
                    step,
                )
                if not self.read_only:
                    self._set_aside(broken)
            return step, state, meta
        return None

    def _meta(self, step: int, formats) -> dict:
        meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
        if meta["format_version"] not in formats:
            raise UserError(
                f"Checkpoint {step} in {self.folder} has format {meta['format_version']}, this "
                f"version reads {' and '.join(map(str, formats))}; use the version that wrote it."
            )
        return {"text_fingerprint": "", **meta}  # earlier ones lack it

    def _state(self, step: int, meta: dict, abstract_state, iterator):
        folder = self.folder / str(step)
        # The manager's own restoring waits for the other processes, of which one may have failed.
        restore = functools.partial(
            ocp.StandardCheckpointHandler().restore,
            folder / "state",
            args=ocp.args.StandardRestore(abstract_state),
        )
        state = everywhere(restore)
        check_sum(state, meta["checksum"])
        if iterator is not None:
            # Grain's own restoring wants as many processes as there were.
            files = sorted((folder / "data").glob("process_*-of-*.json"))
            positions = everywhere(lambda: [json.loads(file.read_text()) for file in files])
            iterator.set_state(positions if len(positions) > 1 else positions[0])
            iterator.start_prefetch()
        return state

    def _set_aside(self, step: int):
        broken = self.folder.with_name("checkpoints.broken")
        if jax.process_index() == 0:
            broken.mkdir(exist_ok=True)
            target = broken / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self.manager.reload()

    def _unwritten(self, error: Exception) -> UserError:
        good = self.manager.all_steps(read=True)
        kept = f"the checkpoint of step {max(good)} is good" if good else "none was written before"
        return UserError(
            f"A checkpoint couldn't be written to {self.folder} ({first_line(error)}); {kept}. "
            "Free some space and run the same command to go on."
        )


def first_line(error: Exception) -> str:
    """The start of an error's text, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
