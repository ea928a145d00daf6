"""The cascade as users call it: a prompt goes in, pictures come out.

    pipe = cascade.load("my-bundle")
    images = pipe("a red apple", num_images=4, seed=0)      # uint8 [4, H, W, 3]

Text is encoded once and handed to every stage. What one stage hands to the next is uint8, just
what its PNG file would hold, so enlarging a saved picture gives what the whole cascade gives.
"""

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from cascade import bundle
from cascade.diffusion.samplers import SAMPLERS
from cascade.errors import UserError
from cascade.images import as_lowres, to_float, to_uint8


def load(folder: str | os.PathLike, text_encoder=None) -> "Cascade":
    """Reads a bundle, checks it, and makes it ready to draw.

    Args:
      folder: a folder that `cascade bundle` or `Cascade.save` wrote.
      text_encoder: see `cascade.bundle.load_bundle`.

    Raises:
      UserError: the bundle is damaged, untrained or doesn't fit together.
    """
    return Cascade(*bundle.load_bundle(folder, text_encoder))


class Cascade:
    """Stages trained apart and sampled together.

    A picture follows from the prompt, the seed, its index and the settings; the batch it is drawn
    in doesn't matter. Each stage is compiled once for a batch shape, a size, and the settings but
    for the guidance weight and the augmentation level: another prompt, seed, guidance weight or
    level costs no compilation. A guidance weight of exactly 1 is the exception: it is a program of
    its own, since it takes half the work.

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
        size: tuple[int, int] | None = None,
        first_index: int = 0,
        batch_size: int = 8,
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
          size: (height, width) of the base picture; None is its training size.
          first_index: index of the first picture: `first_index=5` redraws the sixth alone.
          batch_size: the most pictures that go through a network at once; memory grows with it.
          return_stages: give every stage's pictures.
          progress: show a bar.

        Returns:
          uint8 [len(prompts) * num_images, H, W, 3], a prompt's pictures together; or a list of
          such, one a stage.

        Raises:
          UserError: a value out of range, a size that a network can't draw, or a diverged stage.
        """
        prompts = _checked_prompts(prompt)
        count = len(prompts) * _whole("num_images", num_images, 1)
        indices = _whole("first_index", first_index, 0) + np.arange(count)
        _whole("seed", seed, 0, 2**32 - 1)
        _whole("batch_size", batch_size, 1)
        settings = self.settings(steps, guidance, aug_level, sampler)
        sizes = self._sizes(size)
        null = self._led_away_from(negative_prompt)
        text = _repeated(self._encode(prompts), num_images)
        drawn = []
        batches = math.ceil(count / batch_size)
        with tqdm(total=batches * len(self.stages), unit="batch", disable=not progress) as bar:
            for i in range(len(self.stages)):
                bar.set_description(f"stage {i}, {sizes[i][1]}×{sizes[i][0]}")
                lowres = drawn[-1] if drawn else None
                keys = _keys(seed, indices, i)
                drawn.append(
                    self._draw(i, text, null, lowres, keys, settings[i], sizes[i], batches, bar)
                )
        return drawn if return_stages else drawn[-1]

    def upscale(
        self,
        images,
        prompt: str | Sequence[str] = "",
        stage: int = 1,
        seed: int = 0,
        *,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str = "",
        aug_level: float | Sequence[float] | None = None,
        sampler: str | Mapping | None = None,
        first_index: int = 0,
        batch_size: int = 8,
        progress: bool = True,
    ) -> np.ndarray:
        """Enlarges pictures with one super-resolution stage, whoever made them.

        A picture is first resized, antialiased, until its short side is the stage's
        `lowres_resolution`; its long side follows, rounded to what the network can draw.

        Args:
          images: uint8 or float in [-1, 1], [H, W, 3] or [N, H, W, 3], or PIL pictures.
          prompt: what they show: one text for all, or one for each.
          stage: which stage enlarges; 1 is the first that can.
          Others: as in `__call__`.

        Returns:
          uint8 [N, H', W', 3].

        Raises:
          UserError: as `__call__`, or pictures that can't be read or differ in shape.
        """
        if not 1 <= _whole("stage", stage, 0) < len(self.stages):
            raise UserError(
                f"Stage {stage} can't enlarge: this cascade has {len(self.stages) - 1} "
                f"super-resolution stages, numbered from 1; choose one of those."
            )
        prompts = _checked_prompts(prompt)
        _whole("seed", seed, 0, 2**32 - 1)
        _whole("batch_size", batch_size, 1)
        settings = self.settings(steps, guidance, aug_level, sampler)[stage]
        config, divisor = self.stages[stage].config, self.stages[stage].network.divisor
        lowres, size = as_lowres(images, config.lowres_resolution, config.resolution, divisor)
        count = len(lowres)
        if len(prompts) not in (1, count):
            raise UserError(f"{count} pictures have {len(prompts)} prompts; give one, or one each.")
        keys = _keys(seed, _whole("first_index", first_index, 0) + np.arange(count), stage)
        null = self._led_away_from(negative_prompt)
        text = _repeated(self._encode(prompts), count // len(prompts))
        batches = math.ceil(count / batch_size)
        with tqdm(total=batches, unit="batch", disable=not progress) as bar:
            bar.set_description(f"stage {stage}, {size[1]}×{size[0]}")
            return self._draw(stage, text, null, lowres, keys, settings, size, batches, bar)

    def settings(
        self, steps=None, guidance=None, aug_level=None, sampler=None
    ) -> tuple[FrozenConfigDict, ...]:
        """Each stage's sampling settings, the bundle's where an argument is None.

        Raises:
          UserError: a wrong number of values, or one out of range.
        """
        changes = {"steps": steps, "guidance": guidance, "aug_level": aug_level}
        changes = {key: self._per_stage(key, value) for key, value in changes.items()}
        if sampler is not None:
            changes["sampler"] = (_sampler_section(sampler),) * len(self.stages)
        return tuple(
            stage.settings(
                **{key: values[i] for key, values in changes.items() if values[i] is not None}
            )
            for i, stage in enumerate(self.stages)
        )

    def _per_stage(self, name: str, value) -> tuple:
        """One value a stage, from one for all or from a sequence of as many as stages."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            return (value,) * len(self.stages)
        if len(value) != len(self.stages):
            raise UserError(
                f"{name} has {len(value)} values and the cascade {len(self.stages)} stages; "
                "give one value, or one for each stage."
            )
        return tuple(value)

    def _sizes(self, size: tuple[int, int] | None) -> list[tuple[int, int]]:
        """(height, width) at every stage for a base picture of `size`."""
        base = self.stages[0].config.resolution
        if size is None:
            size = (base, base)
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
            raise UserError(f"size is {size!r}; give (height, width) of the base picture.")
        for side in size:
            _whole("a side of size", side, 1)
        sizes = []
        for i, stage in enumerate(self.stages):
            scaled = [side * stage.config.resolution for side in size]
            if any(side % base for side in scaled):
                raise UserError(
                    f"Stage {i} can't enlarge {size[1]}×{size[0]} by "
                    f"{stage.config.resolution}/{base} to whole pixels; choose another size."
                )
            sizes.append((scaled[0] // base, scaled[1] // base))
            try:
                stage.check_size(sizes[-1])
            except UserError as error:
                raise UserError(f"Stage {i}: {error}") from error
        return sizes

    def _encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        """text_emb [P, L, D] and text_mask [P, L]; a text without words has the null condition."""
        emb, mask = self.text_encoder.encode(texts)
        null_emb, null_mask = self.text_encoder.null()
        blank = np.array([not text.strip() for text in texts]) | ~np.asarray(mask).any(axis=1)
        return {
            "text_emb": np.where(blank[:, None, None], null_emb, emb),
            "text_mask": np.where(blank[:, None], null_mask, mask),
        }

    def _led_away_from(self, negative_prompt: str) -> dict[str, np.ndarray]:
        """The condition that guidance leads away from, a batch of one."""
        if _checked_prompts(negative_prompt, "negative_prompt")[0].strip():
            return self._encode([negative_prompt])
        null_emb, null_mask = self.text_encoder.null()
        return {"text_emb": null_emb[None], "text_mask": null_mask[None]}

    def _draw(self, index, text, null, lowres, keys, settings, size, batches, bar) -> np.ndarray:
        """All pictures of one stage, in batches of one shape.

        The last batch is filled up by repeating its last picture, so that it's no shape of its own.
        """
        stage, params, _ = self._trained[index]
        # Traced, not baked in: only whether the weight is 1 makes another program.
        guided = settings.guidance != 1.0
        weight = np.float32(settings.guidance) if guided else None
        level = np.float32(settings.aug_level)
        program = stage.settings(
            **{**settings.to_dict(), "guidance": 0.0 if guided else 1.0, "aug_level": 0.0}
        )
        count = len(keys)
        rows = math.ceil(count / batches)
        null = _repeated(null, rows)
        pictures = []
        for start in range(0, count, rows):
            take = np.minimum(np.arange(start, start + rows), count - 1)
            cond = {key: value[take] for key, value in text.items()}
            if not stage.is_base:
                cond["lowres"] = to_float(lowres[take])
            x = np.asarray(
                stage.draw(params, cond, null, keys[take], program, size, weight, level)
            )[: count - start]
            if not np.isfinite(x).all():
                raise UserError(
                    f"Stage {index} drew NaN, with guidance {settings.guidance:g} and "
                    f"{settings.steps} steps; lower the guidance or train the stage anew."
                )
            pictures.append(to_uint8(x))
            bar.update()
        return np.concatenate(pictures)


@jax.jit
def _fold(key, indices, stage):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), stage))(indices)


def _keys(seed: int, indices: np.ndarray, stage: int) -> jax.Array:
    """One key a picture: fold_in(fold_in(key(seed), index), stage)."""
    return _fold(jax.random.key(np.uint32(seed)), indices.astype(np.uint32), stage)


def _repeated(cond: Mapping[str, np.ndarray], times: int) -> dict[str, np.ndarray]:
    """Each row `times` times, side by side."""
    return {key: np.repeat(value, times, axis=0) for key, value in cond.items()}


def _checked_prompts(prompt, name: str = "prompt") -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(prompts, Sequence)
        or len(prompts) == 0
        or not all(isinstance(text, str) for text in prompts)
    ):
        raise UserError(f"The {name} is {str(prompt)[:60]!r}; give a text, or a list of texts.")
    return list(prompts)


def _whole(name: str, value, least: int, most: int | None = None) -> int:
    """`value`, if it's a whole number in range."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{name} is {value!r}; give a whole number, {limits}.")
    return int(value)


def _sampler_section(sampler: str | Mapping) -> dict:
    """A sampler's config section; a name alone takes its factory's own defaults."""
    if isinstance(sampler, Mapping):
        return dict(sampler)
    section = {"name": sampler}
    if sampler in SAMPLERS:
        for key, parameter in inspect.signature(SAMPLERS[sampler]).parameters.items():
            if parameter.default is not parameter.empty:
                section[key] = parameter.default
    return section
