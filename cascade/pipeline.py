"""The cascade as users call it: a prompt goes in, pictures come out.

    pipe = cascade.load("my-bundle")
    images = pipe("a red apple", num_images=4, seed=0)      # uint8 [4, H, W, 3]

Text is encoded once and handed to every stage. What one stage hands to the next is uint8, just
what its PNG file would hold, so enlarging a saved picture gives what the whole cascade gives.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from cascade import batches, bundle
from cascade.arguments import checked_prompts, stage_settings, stage_sizes, whole
from cascade.errors import UserError
from cascade.images import as_lowres
from cascade.text.interface import checked_text


def load(folder: str | os.PathLike, text_encoder=None, text_weights: str = "") -> "Cascade":
    """Reads a bundle, checks it, and makes it ready to draw.

    Args:
      folder: a folder that `cascade bundle` or `Cascade.save` wrote.
      text_encoder, text_weights: see `cascade.bundle.load_bundle`.

    Raises:
      UserError: the bundle is damaged, untrained or doesn't fit together.
    """
    return Cascade(*bundle.load_bundle(folder, text_encoder, text_weights))


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

    Attributes:
      stages: `cascade.stage.Stage`s, base first.
      text_encoder: what turns prompts into embeddings.
    """

    def __init__(
        self, stages: Sequence[bundle.TrainedStage], text: Mapping[str, Any], text_encoder
    ):
        """Puts trained stages together.

        Args:
          stages: base first.
          text: the text encoder's config section, which `save` writes down.
          text_encoder: the encoder that every stage was trained with.

        Raises:
          UserError: a stage is untrained, or the stages don't fit one another or the encoder.
        """
        bundle.check_fit(stages, text_encoder)
        self._trained = tuple(
            trained._replace(params=jax.device_put(trained.params)) for trained in stages
        )
        self._text = dict(text)
        self.stages = tuple(trained.stage for trained in stages)
        self.text_encoder = text_encoder

    def save(self, folder: str | os.PathLike, *, dtype: str = "float32", overwrite: bool = False):
        """Writes a bundle; see `cascade.bundle.save_bundle` for what it raises."""
        return bundle.save_bundle(
            folder, self._trained, self._text, self.text_encoder, dtype=dtype, overwrite=overwrite
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        seed: int = 0,
        *,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str = "",
        aug_level: float | Sequence[float] | None = None,
        sampler: str | Mapping | None = None,
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
          prompt: one text or several. An empty one draws without a condition, and a warning in the
            log says so, as it does where a prompt is longer than the encoder reads.
          num_images: pictures for each prompt.
          seed: 0 ... 2³² - 1.
          steps: sampling steps, one number for all stages or one for each; None is the bundle's.
          guidance: guidance weight w, likewise; 1 is none (and then `negative_prompt` is unused).
          negative_prompt: what guidance leads away from; empty is the null condition.
          aug_level: noise on each stage's low-resolution input, 0 to 1; the base stage has none.
          sampler: a name in `SAMPLERS`, or its section `{"name": ..., **keywords}`.
          tile: predict larger pictures in tiles of this many pixels a side, to need less memory;
            one number for all stages or one for each, 0 is the whole picture at once.
          tile_overlap: pixels by which tiles overlap at least, likewise.
          size: (height, width) of the base picture; None is its training size.
          first_index: index of the first picture: `first_index=5` redraws the sixth alone.
          batch_size: pictures that go through a network at once; memory grows with it. None is 1
            on a CPU, where more gain nothing, and 8 elsewhere.
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
            tile=tile,
            tile_overlap=tile_overlap,
        )
        kept = [stages if return_stages else stages[-1:] for stages in drawn]
        pictures = [np.concatenate(stage) for stage in zip(*kept, strict=True)]
        return pictures if return_stages else pictures[0]

    def draw_batches(
        self,
        prompt: str | Sequence[str],
        num_images: int = 1,
        seed: int = 0,
        *,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = True,
        **changes,
    ) -> Iterator[list[np.ndarray]]:
        """Draws pictures batch by batch, each through all stages, and keeps none of them.

        Args:
          **changes: steps, guidance, aug_level, sampler, tile, tile_overlap, as in `__call__`.
          Others: as in `__call__`.

        Returns:
          An iterator over batches, each a list of uint8 [B, H, W, 3], one a stage; together they
          are `__call__`'s pictures in order.

        Raises:
          UserError: as `__call__`; for arguments at once, for diverged stages while iterating.
        """
        prompts = checked_prompts(prompt)
        count = len(prompts) * whole("num_images", num_images, 1, 2**32 // len(prompts))
        sizes, settings = stage_sizes(self.stages, size), self.settings(**changes)
        request = self._request(prompts, count, seed, negative_prompt, first_index, batch_size)
        every = range(len(self.stages))
        return batches.draw(self._trained, request, every, settings, sizes, progress=progress)

    def upscale(
        self,
        images,
        prompt: str | Sequence[str] = "",
        stage: int = 1,
        seed: int = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        aug_level: float | None = None,
        sampler: str | Mapping | None = None,
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
            tile=tile,
            tile_overlap=tile_overlap,
        )
        return np.concatenate([pictures for (pictures,) in drawn])

    def upscale_batches(
        self,
        images,
        prompt: str | Sequence[str] = "",
        stage: int = 1,
        seed: int = 0,
        *,
        negative_prompt: str = "",
        first_index: int = 0,
        batch_size: int | None = None,
        progress: bool = True,
        **changes,
    ) -> Iterator[list[np.ndarray]]:
        """Enlarges pictures batch by batch; to `upscale` what `draw_batches` is to `__call__`.

        Args:
          **changes: steps, guidance, aug_level, sampler, tile, tile_overlap, as in `upscale`.
          Others: as in `upscale`.

        Returns:
          An iterator over batches, each a list of one uint8 [B, H', W', 3].

        Raises:
          UserError: as `upscale`; for arguments at once, for a diverged stage while iterating.
        """
        if not 1 <= whole("stage", stage, 0) < len(self.stages):
            raise UserError(
                f"Stage {stage} can't enlarge: this cascade has {len(self.stages) - 1} "
                f"super-resolution stages, numbered from 1; choose one of those."
            )
        prompts = checked_prompts(prompt)
        (settings,) = self.settings(**changes, stage=stage)
        config, divisor = self.stages[stage].config, self.stages[stage].network.divisor
        lowres, size = as_lowres(images, config.lowres_resolution, config.resolution, divisor)
        count = len(lowres)
        if len(prompts) not in (1, count):
            raise UserError(f"{count} pictures have {len(prompts)} prompts; give one, or one each.")
        request = self._request(prompts, count, seed, negative_prompt, first_index, batch_size)
        return batches.draw(
            self._trained, request, [stage], {stage: settings}, {stage: size}, lowres, progress
        )

    def settings(
        self,
        steps=None,
        guidance=None,
        aug_level=None,
        sampler=None,
        tile=None,
        tile_overlap=None,
        stage=None,
    ) -> tuple[FrozenConfigDict, ...]:
        """Each stage's sampling settings, or those of `stage`; the bundle's for what is None.

        Raises:
          UserError: a wrong number of values, or one that a stage can't take.
        """
        return stage_settings(
            self.stages if stage is None else self.stages[stage : stage + 1],
            sampler,
            steps=steps,
            guidance=guidance,
            aug_level=aug_level,
            tile=tile,
            tile_overlap=tile_overlap,
        )

    def _request(
        self, prompts, count, seed, negative_prompt, first_index, batch_size
    ) -> batches.Request:
        """Checks and encodes what drawing and enlarging have in common."""
        whole("seed", seed, 0, 2**32 - 1)
        whole("first_index", first_index, 0, 2**32 - count)
        if batch_size is None:
            batch_size = 1 if jax.default_backend() == "cpu" else 8
        batch_size = whole("batch_size", batch_size, 1)
        rows = batch_size if count > 1 else 1
        null = self._led_away_from(negative_prompt)
        text = self._encode(prompts)
        return batches.Request(text, null, count // len(prompts), count, rows, seed, first_index)

    def _encode(self, texts: list[str], what: str = "prompt") -> dict[str, np.ndarray]:
        """text_emb [P, L, D] and text_mask [P, L]; a text without words has the null condition."""
        emb, mask = self.text_encoder.encode(texts, what)
        null_emb, null_mask = self.text_encoder.null()
        blank = np.array([not text.strip() for text in texts]) | ~np.asarray(mask).any(axis=1)
        return {
            "text_emb": np.where(blank[:, None, None], null_emb, emb),
            "text_mask": np.where(blank[:, None], null_mask, mask),
        }

    def _led_away_from(self, negative_prompt: str) -> dict[str, np.ndarray]:
        """The condition that guidance leads away from, a batch of one."""
        if checked_text(negative_prompt, "negative prompt").strip():
            return self._encode([negative_prompt], "negative prompt")
        null_emb, null_mask = self.text_encoder.null()
        return {"text_emb": null_emb[None], "text_mask": null_mask[None]}
