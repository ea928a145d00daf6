"""The cascade as users call it: a prompt goes in, pictures come out.

    pipe = cascade.load("my-bundle")
    images = pipe("a red apple", num_images=4, seed=0)      # uint8 [4, H, W, 3]

Text is encoded once and handed to every stage. What one stage hands to the next is uint8, just
what its PNG file would hold, so enlarging a saved picture gives what the whole cascade gives.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from cascade import batches, bundle
from cascade.arguments import checked_prompts, enlarging, stage_settings, stage_sizes, whole
from cascade.errors import UserError
from cascade.images import as_lowres
from cascade.parallel.layout import Layout
from cascade.parallel.mesh import all_devices, on_all_processes, put
from cascade.parallel.rules import shardings
from cascade.request import default_batch_size, request
from cascade.stage import Stage
from cascade.students import check_negative_prompt
from cascade.text.between import Between


def load(
    folder: str | os.PathLike | None = None,
    text_encoder=None,
    text_weights: str = "",
    mesh: Mesh | None = None,
) -> "Cascade":
    """Reads a bundle, checks it, and makes it ready to draw.

    Args:
      folder: a folder that `cascade bundle` or `Cascade.save` wrote; None is the bundle that comes
        with the package.
      text_encoder, text_weights: see `cascade.bundle.load_bundle`.
      mesh: the devices to draw on, as `Cascade` takes it. Weights go straight to them, and a
        host holds no more than one tensor at a time.

    Raises:
      UserError: the bundle is damaged, untrained or doesn't fit together, on any process.
    """
    folder = bundle.SHIPPED if folder is None else folder
    mesh = mesh or all_devices()
    read = functools.partial(bundle.load_bundle, folder, text_encoder, text_weights, mesh)
    return Cascade(*on_all_processes(read, mesh), mesh)


class Cascade:
    """Stages trained apart and sampled together.

    A picture follows from the prompt, the seed, its index and the settings, and not from what is
    drawn beside it. Every batch has `batch_size` rows, the last one filled up, but for a picture
    drawn alone, which is a batch of one. With the same rows, on the same machine, the same picture
    comes out to the bit. Another number of rows is another program, which sums in another order:
    the same picture to within rounding, a level of 255 here and there.

    Each stage is compiled once for a batch shape, a size, and the settings but for the guidance
    weight and the augmentation level: another prompt, seed, guidance weight or level costs no
    compilation. A guidance weight of exactly 1 is the exception: it is a program of its own, since
    it takes half the work.

    Over a mesh of several processes, all of them call a method together, with the same arguments,
    and all get the same pictures. Another mesh gives the same pictures, to within rounding.

    Attributes:
      stages: `cascade.stage.Stage`s, base first.
      text_encoder: what turns prompts into embeddings.
      mesh: the devices that draw.
    """

    def __init__(
        self,
        stages: Sequence[bundle.TrainedStage],
        text: Mapping[str, Any],
        text_encoder,
        mesh: Mesh | None = None,
    ):
        """Puts trained stages together.

        Args:
          stages: base first.
          text: the text encoder's config section, which `save` writes down.
          text_encoder: the encoder that every stage was trained with. Where the mesh splits
            weights, its own are split too (`TextEncoder.place`).
          mesh: from `cascade.parallel.mesh.make_mesh`. Pictures are split over its axes `data`
            and `fsdp`, weights over `fsdp` and `tensor`. None splits pictures over all devices.

        Raises:
          UserError: a stage is untrained, or the stages don't fit one another or the encoder.
        """
        bundle.check_fit(stages, text_encoder)
        self.mesh = mesh or all_devices()
        if self.mesh.shape["data"] < self.mesh.size:
            text_encoder.place(self.mesh)
        self._trained = tuple(map(self._placed, stages))
        self._text = dict(text)
        self.stages = tuple(trained.stage for trained in self._trained)
        self.text_encoder = text_encoder

    def _placed(self, trained: bundle.TrainedStage) -> bundle.TrainedStage:
        """A stage that knows how it lies on the mesh, and its weights there."""
        stage, layout = trained.stage, Layout.of(self.mesh)
        if layout:
            stage = Stage(stage.config, tuple(stage.null_cond.values()), layout)
        params = jax.tree.map(put, trained.params, shardings(trained.params, self.mesh))
        return trained._replace(stage=stage, params=params)

    def save(self, folder: str | os.PathLike, *, dtype: str = "float32", overwrite: bool = False):
        """Writes a bundle; see `cascade.bundle.save_bundle`.

        Raises:
          UserError: as that; or the weights are spread over several processes.
        """
        if self.mesh.is_multi_process:
            raise UserError("These weights are spread over several processes; save them from one.")
        return bundle.save_bundle(
            folder, self._trained, self._text, self.text_encoder, dtype=dtype, overwrite=overwrite
        )

    def __call__(
        self,
        prompt: str | Between | Sequence[str | Between],
        num_images: int = 1,
        seed: int = 0,
        *,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str = "",
        aug_level: float | Sequence[float] | None = None,
        sampler: str | Mapping | None = None,
        spacing: str | Mapping | None = None,
        tile: int | Sequence[int] | None = None,
        tile_overlap: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        return_stages: bool = False,
        progress: bool = True,
    ) -> np.ndarray | list[np.ndarray]:
        """Draws pictures.

        Args:
          prompt: one text or several; `Between` two is one too. An empty one draws without a
            condition, and the log warns of it, as of one that is longer than the encoder reads.
          num_images: pictures for each prompt.
          seed: 0 ... 2³² - 1.
          steps: sampling steps, one number for all stages or one for each; None is the bundle's.
          guidance: guidance weight w, likewise; 1 is none (and then `negative_prompt` is unused).
          negative_prompt: what guidance leads away from; empty is the null condition.
          aug_level: noise on each stage's low-resolution input, 0 to 1; the base stage has none.
          sampler: a name in `SAMPLERS`, or its section `{"name": ..., **keywords}`.
          spacing: likewise of `SPACINGS`; None is what was searched for the sampler and steps, else
            the bundle's.
          tile: predict larger pictures in tiles of this many pixels a side, to need less memory;
            one number for all stages or one for each, 0 is the whole picture at once.
          tile_overlap: pixels by which tiles overlap at least, likewise.
          size: (height, width) of the base picture; None is its training size.
          first_index: index of the first picture: `first_index=5` redraws the sixth alone.
          batch_size: pictures that go through a network at once, on all devices together, rounded
            up to as many on each; memory grows with it. None is up to 8, on a CPU up to 4 or, of
            pictures beyond 256 pixels a side, 1: as few even batches as that makes.
          return_stages: give every stage's pictures.
          progress: show a bar.

        Returns:
          uint8 [len(prompts) * num_images, H, W, 3], a prompt's pictures together; or a list of
          such, one a stage.

        Raises:
          UserError: a value out of range, a size that a network can't draw, or a diverged stage.
        """
        drawn = self.draw_batches(
            prompt,
            num_images,
            seed,
            negative_prompt=negative_prompt,
            size=size,
            first_index=first_index,
            batch_size=batch_size,
            progress=progress,
            steps=steps,
            guidance=guidance,
            aug_level=aug_level,
            sampler=sampler,
            spacing=spacing,
            tile=tile,
            tile_overlap=tile_overlap,
        )
        kept = [stages if return_stages else stages[-1:] for stages in drawn]
        pictures = [np.concatenate(stage) for stage in zip(*kept, strict=True)]
        return pictures if return_stages else pictures[0]

    def draw_batches(
        self,
        prompt: str | Between | Sequence[str | Between],
        num_images: int = 1,
        seed: int = 0,
        *,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = True,
        **changes,
    ) -> Iterator[batches.Batch]:
        """Draws pictures batch by batch, each through all stages, and keeps none of them.

        Args:
          **changes: sampling settings, from `steps` to `tile_overlap`, as in `__call__`.
          Others: as in `__call__`.

        Returns:
          An iterator over batches, each a sequence of uint8 [B, H, W, 3], one a stage; together
          they are `__call__`'s pictures in order. Of several processes, each can have its own
          pictures alone: see `Batch.own`.

        Raises:
          UserError: as `__call__`; for arguments at once, for diverged stages while iterating.
        """
        prompts = checked_prompts(prompt)
        check_negative_prompt(self.stages, negative_prompt)
        if not self.stages[0].is_base:
            raise UserError(
                "This bundle has no base stage, so it draws nothing from text alone; enlarge a "
                "picture with it (cascade upscale --stage 0), or bundle it after a base stage."
            )
        count = len(prompts) * whole("num_images", num_images, 1, 2**32 // len(prompts))
        sizes, settings = stage_sizes(self.stages, size), self.settings(**changes)
        if batch_size is None:
            batch_size = default_batch_size(self.mesh, max(sizes[-1]), count)
        how = seed, negative_prompt, first_index, batch_size
        wanted = request(self.text_encoder, self.mesh, prompts, count, *how)
        every = range(len(self.stages)), settings, sizes
        return batches.draw(self._trained, self.mesh, wanted, *every, progress=progress)

    def upscale(
        self,
        images,
        prompt: str | Between | Sequence[str | Between] = "",
        stage: int = 1,
        seed: int = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        aug_level: float | None = None,
        sampler: str | Mapping | None = None,
        spacing: str | Mapping | None = None,
        tile: int | None = None,
        tile_overlap: int | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Enlarges pictures with one super-resolution stage, whoever made them.

        A picture is first resized, antialiased, until its short side is the stage's
        `lowres_resolution`; its long side follows, rounded to what the network can draw.

        Args:
          images: uint8 or float in [-1, 1], [H, W, 3] or [N, H, W, 3], or PIL pictures.
          prompt: what they show: one text for all, or one for each.
          stage: which stage enlarges; 1 is the first that can.
          steps, guidance, aug_level, tile, tile_overlap: one value, of that stage.
          Others: as in `__call__`.

        Returns:
          uint8 [N, H', W', 3].

        Raises:
          UserError: as `__call__`, or pictures that can't be read or differ in shape.
        """
        drawn = self.upscale_batches(
            images,
            prompt,
            stage,
            seed,
            negative_prompt=negative_prompt,
            first_index=first_index,
            batch_size=batch_size,
            progress=progress,
            steps=steps,
            guidance=guidance,
            aug_level=aug_level,
            sampler=sampler,
            spacing=spacing,
            tile=tile,
            tile_overlap=tile_overlap,
        )
        return np.concatenate([pictures for (pictures,) in drawn])

    def upscale_batches(
        self,
        images,
        prompt: str | Between | Sequence[str | Between] = "",
        stage: int = 1,
        seed: int = 0,
        *,
        negative_prompt: str = "",
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = True,
        **changes,
    ) -> Iterator[batches.Batch]:
        """Enlarges pictures batch by batch; to `upscale` what `draw_batches` is to `__call__`.

        Args:
          **changes: sampling settings, from `steps` to `tile_overlap`, as in `upscale`.
          Others: as in `upscale`.

        Returns:
          An iterator over batches, each a sequence of one uint8 [B, H', W', 3].

        Raises:
          UserError: as `upscale`; for arguments at once, for a diverged stage while iterating.
        """
        (settings,) = self.settings(**changes, stage=enlarging(self.stages, stage))
        prompts = checked_prompts(prompt)
        check_negative_prompt([self.stages[stage]], negative_prompt)
        config, divisor = self.stages[stage].config, self.stages[stage].network.divisor
        lowres, size = as_lowres(images, config.lowres_resolution, config.resolution, divisor)
        count = len(lowres)
        if len(prompts) not in (1, count):
            raise UserError(f"{count} pictures have {len(prompts)} prompts; give one, or one each.")
        if batch_size is None:
            batch_size = default_batch_size(self.mesh, max(size), count)
        how = seed, negative_prompt, first_index, batch_size
        wanted = request(self.text_encoder, self.mesh, prompts, count, *how)
        only = [stage], {stage: settings}, {stage: size}
        return batches.draw(self._trained, self.mesh, wanted, *only, lowres, progress)

    def settings(
        self, steps=None, guidance=None, *, stage: int | None = None, **changes
    ) -> tuple[FrozenConfigDict, ...]:
        """Each stage's sampling settings, or those of `stage`; the bundle's for what is None.

        Raises:
          UserError: a wrong number of values, or one that a stage can't take.
        """
        stages = self.stages if stage is None else self.stages[stage : stage + 1]
        return stage_settings(stages, steps=steps, guidance=guidance, **changes)
