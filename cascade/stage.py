"""One diffusion model of the cascade: its loss for training, its sampler for drawing.

A stage knows nothing of the others. A super-resolution stage sees `lowres` pictures, whoever made
them: the stage before, a data pipeline, or a user's file.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from cascade import registry
from cascade.checks import check_sampling, check_stage
from cascade.diffusion import conditioning, guidance, losses, process, samplers, tiling
from cascade.diffusion.schedules import SCHEDULES
from cascade.diffusion.spacings import SPACINGS
from cascade.errors import UserError
from cascade.networks import NETWORKS, cost
from cascade.parallel.layout import Layout
from cascade.students import check_drawing

# Conditions that follow from the sampling settings: whoever draws gives the others.
FOLLOWING = ("aug_logsnr", "guidance_weight")
BUCKET_EDGES = (-12.0, -8.0, -4.0, 0.0, 4.0, 8.0, 12.0)  # logsnr; 8 buckets


class Stage:
    """What a `stage` section of a config describes. Holds no parameters.

    Attributes:
      config: the section.
      network: a Linen module, `predict(z_t, logsnr, cond)`.
      null_cond: what no text is: `text_emb` [L,D] and `text_mask` [L].
      is_base: True where it draws from text alone, False where it enlarges `lowres`.
      embeds_guidance: guidance was distilled into it: the weight is one more condition.
    """

    def __init__(self, config, null_text=None, layout: Layout | None = None):
        """Builds the stage.

        Args:
          config: the `stage` section, a ConfigDict; its keys are `cascade.schema.STAGE`.
          null_text: the text encoder's null condition (emb [L,D], mask [L]), which dropped texts
            become in training; Imagen's by default: zeros and a cleared mask.
          layout: how the network's insides lie on a mesh; None leaves it to XLA.

        Raises:
          UserError: a key is missing, foreign, or at odds with another.
        """
        check_stage(config)
        self.config = config
        self.is_base = config.lowres_resolution == 0
        self.embeds_guidance = bool(config.distilled.guidance)
        outputs = config.channels * (2 if config.learned_variance else 1)
        self.network = registry.build(
            "network",
            NETWORKS,
            config.network,
            out_channels=outputs,
            super_resolution=not self.is_base,
            layout=layout,
        )
        self.schedule = registry.build("schedule", SCHEDULES, config.schedule)
        self.aug_schedule = registry.build("schedule", SCHEDULES, config.aug_schedule)
        self.weighting = registry.build("weighting", losses.WEIGHTINGS, config.weighting)
        emb, mask = null_text or (
            np.zeros((config.text_length, config.text_width), np.float32),
            np.zeros(config.text_length, bool),
        )
        self.null_cond = {"text_emb": emb, "text_mask": mask}
        self.training_resolution = config.crop_resolution or config.resolution
        self.check_size((config.resolution,) * 2)
        self.check_size((self.training_resolution,) * 2)
        self._check_tiles(config.sampling)

    def check_size(self, size: tuple[int, int]):
        """Raises a UserError unless the network can draw pictures of `size` = (H, W)."""
        divisor = self.network.divisor
        if min(size) < 1 or any(side % divisor for side in size):
            raise UserError(
                f"This stage can't draw {size[1]}×{size[0]} (width×height): both sides must be "
                f"multiples of {divisor}."
            )

    def _check_tiles(self, sampling: Mapping):
        """Raises a UserError unless the network can draw tiles cut as `sampling` says.

        A tile is a picture to the network, and `lowres` is cut with it.
        """
        if not sampling["tile"]:
            return
        c, factor = self.config, 1
        if not self.is_base and c.lowres_upsampling == "after_noise":
            if c.resolution % c.lowres_resolution:
                raise UserError(
                    f"This stage enlarges {c.lowres_resolution} to {c.resolution} pixels, not by a "
                    "whole factor, so it can't draw in tiles; set tile to 0."
                )
            factor = c.resolution // c.lowres_resolution
        needed = {"tile": math.lcm(factor, self.network.divisor), "tile_overlap": factor}
        for name, unit in needed.items():
            if sampling[name] % unit:
                raise UserError(
                    f"{name} is {sampling[name]}, not a multiple of {unit}, as this stage needs; "
                    "choose one that is."
                )

    def shapes(self, batch: int, size: tuple[int, int] | None = None):
        """`jax.ShapeDtypeStruct`s of the network's arguments (z_t, logsnr, cond).

        Args:
          size: (H, W); the training resolution by default.
        """
        c = self.config
        height, width = size or (self.training_resolution,) * 2
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        cond = {
            "text_emb": array((batch, c.text_length, c.text_width)),
            "text_mask": jax.ShapeDtypeStruct((batch, c.text_length), bool),
        }
        if not self.is_base:
            low = (
                height * c.lowres_resolution // c.resolution,
                width * c.lowres_resolution // c.resolution,
            )
            cond |= {"lowres": array((batch, *low, c.channels)), "aug_logsnr": array((batch,))}
        if self.embeds_guidance:
            cond["guidance_weight"] = array((batch,))
        return array((batch, height, width, c.channels)), array((batch,)), cond

    def given_shapes(self, batch: int, size: tuple[int, int] | None = None):
        """As `shapes`, of what is given to train and to draw: (image, cond without FOLLOWING)."""
        image, _, cond = self.shapes(batch, size)
        return image, {key: shape for key, shape in cond.items() if key not in FOLLOWING}

    def init(self, key):
        """Fresh parameters, float32, a nested dict."""
        arguments = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes(1))
        return self.network.clone(layout=None).init(key, *arguments)["params"]

    @functools.cached_property
    def forward_flops(self) -> int:
        """FLOPs of one forward pass of one picture at the training resolution."""
        network = self.network.clone(layout=None)
        return round(sum(row.flops for row in cost.describe(network, *self.shapes(1))))

    def loss(self, params, batch, key, train: bool = True):
        """The weighted denoising loss of a batch, and its metrics.

        Args:
          batch: `image` [B,H,W,C] in [-1,1], `text_emb` [B,L,D], `text_mask` [B,L], and for a
            super-resolution stage `lowres` [B,h,w,C]; `valid` [B], where given, says which count.
          key: times, noise, dropped texts, augmentation and dropout all follow from it.
          train: False switches network dropout and text dropping off.

        Returns:
          As `tally`.
        """
        x = batch["image"]
        time_key, noise_key, text_key, aug_key, dropout_key = jax.random.split(key, 5)
        t = losses.stratified_times(time_key, x.shape[0])
        logsnr = self.schedule(t)
        eps = jax.random.normal(noise_key, x.shape)
        z_t = process.diffuse(x, eps, logsnr)

        cond = self.conditions(batch, text_key, aug_key, train)
        output = self.network.apply(
            {"params": params}, z_t, logsnr, cond, not train, rngs={"dropout": dropout_key}
        )
        prediction = process.predictions(output, z_t, logsnr, self.config.output)
        each = losses.denoising_loss(prediction, x, eps, t, self.schedule, self.weighting)
        return self.tally(each, logsnr, batch)

    def conditions(self, batch, text_key, aug_key, train: bool) -> dict:
        """A batch's conditions as the network learns from them.

        Args:
          batch, train: as in `loss`.
          text_key: which texts are dropped follows from it.
          aug_key: how noisy `lowres` becomes, and its noise.
        """
        cond = {"text_emb": batch["text_emb"], "text_mask": batch["text_mask"]}
        if train:
            cond["text_emb"], cond["text_mask"] = conditioning.drop_text(
                text_key, *cond.values(), self.config.text_drop, *self.null_cond.values()
            )
        if not self.is_base:
            cond |= self._augmented(aug_key, batch["lowres"], batch["image"].shape[1:3])
        return cond

    def tally(self, each, logsnr, batch) -> tuple[jax.Array, dict]:
        """The mean of a batch's losses, and its metrics.

        Args:
          each, logsnr: [B], every example's loss and level.
          batch: says by `valid` [B], where it has it, which count.

        Returns:
          (loss, {"loss": (), "bucket_sum": [K], "bucket_count": [K]}): sums by logsnr bucket.
        """
        member = jax.nn.one_hot(
            jnp.searchsorted(jnp.array(BUCKET_EDGES), logsnr), len(BUCKET_EDGES) + 1
        )
        valid = batch["valid"].astype(jnp.float32) if "valid" in batch else jnp.ones(len(each))
        member *= valid[:, None]
        loss = (each @ valid) / jnp.maximum(valid.sum(), 1.0)
        metrics = {"loss": loss, "bucket_sum": each @ member, "bucket_count": member.sum(0)}
        return loss, metrics

    def _augmented(self, key, lowres, size, level=None) -> dict:
        """The conditions that `lowres` becomes: noised, at its own or the output's `size`."""
        if self.config.lowres_upsampling == "before_noise":
            lowres = conditioning.upsample_lowres(lowres, size)
        noised, aug_logsnr = conditioning.augment_lowres(key, lowres, self.aug_schedule, level)
        return {"lowres": noised, "aug_logsnr": aug_logsnr}

    def settings(self, **changes) -> FrozenConfigDict:
        """The config's `sampling` section with some keys changed; hashable, so jit can key on it.

        Levels that were searched for just this sampler and number of steps become the spacing,
        unless `changes` name another.

        Raises:
          UserError: an unknown key, a value outside its range, tiles that it can't draw, or what a
            student wasn't taught.
        """
        merged = {**self.config.sampling.to_dict(), **changes}
        check_sampling(merged)
        check_drawing(self.config, merged)
        self._check_tiles(merged)
        for sampler, levels in merged["searched"]:
            fits = (sampler, len(levels) - 1) == (merged["sampler"]["name"], merged["steps"])
            if fits and "spacing" not in changes:
                merged["spacing"] = {"name": "given", "levels": levels}
        settings = FrozenConfigDict(merged)
        self.levels(settings)
        return settings

    def levels(self, settings):
        """logsnr [steps + 1], increasing: the noise levels that the settings visit.

        Raises:
          UserError: the spacing can't be had with this schedule or number of steps.
        """
        spacing = registry.build("spacing", SPACINGS, settings.spacing)
        return spacing(self.schedule, settings.steps)

    def denoiser(self, params, cond, null_cond, settings, guidance_weight):
        """denoise(z_t, logsnr) -> Denoised: threshold ∘ guide ∘ to_x ∘ tile ∘ predict.

        Args:
          cond, null_cond: conditions of B pictures; the second is what guidance leads away from.
          guidance_weight: 1.0 (a Python float) costs one evaluation; else two, as a batch of 2B.
            The settings' schedule says where it holds.
        """

        def predict(z_t, logsnr, cond):
            return self.network.apply({"params": params}, z_t, logsnr, cond)

        if settings.tile:
            predict = tiling.tiled(predict, settings.tile, settings.tile_overlap)
        schedule = registry.build(
            "guidance schedule", guidance.GUIDANCE_SCHEDULES, settings.guidance_schedule
        )
        guided = guidance.guide(
            guidance.denoiser(predict, self.config.output),
            cond,
            null_cond,
            schedule(guidance_weight, self.levels(settings)),
            rescale=settings.rescale,
        )
        threshold = registry.build("threshold", guidance.THRESHOLDS, settings.threshold)
        return guidance.thresholded(guided, threshold)

    def sample(
        self,
        params,
        cond,
        null_cond,
        keys,
        settings,
        size,
        guidance_weight=None,
        aug_level=None,
        levels=None,
    ):
        """Draws B pictures, float32 [B,H,W,C] in [-1,1].

        Args:
          cond: `text_emb`, `text_mask` and, for a super-resolution stage, clean `lowres`.
          null_cond: `text_emb`, `text_mask` of the null or of a negative prompt.
          keys: [B] PRNG keys, one a picture, so that a picture doesn't depend on its batch.
          settings: what `self.settings()` returns. Static under jit.
          size: (H, W). Static under jit.
          guidance_weight, aug_level, levels: override the settings' own; may be traced.
        """
        self.check_size(size)
        aug_keys, z_keys, step_keys = (
            jax.vmap(jax.random.fold_in, (0, None))(keys, purpose) for purpose in range(3)
        )
        more = {}
        if not self.is_base:
            level = settings.aug_level if aug_level is None else aug_level
            more = self._augmented(aug_keys, cond["lowres"], size, level)
        weight = settings.guidance if guidance_weight is None else guidance_weight
        if self.embeds_guidance:  # one evaluation, of a network that is told the weight
            more["guidance_weight"] = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), keys.shape)
            weight = 1.0
        cond, null_cond = {**cond, **more}, {**null_cond, **more}
        denoise = self.denoiser(params, cond, null_cond, settings, weight)
        shape = (*size, self.config.channels)
        z_1 = process.picture_noise(z_keys, shape)
        sampler = registry.build("sampler", samplers.SAMPLERS, settings.sampler)
        levels = self.levels(settings) if levels is None else levels
        x = samplers.sample(sampler, denoise, z_1, levels, step_keys)
        return jnp.clip(x, -1.0, 1.0)

    @functools.cached_property
    def draw(self):
        """`sample`, compiled once for each settings and size."""
        return jax.jit(self.sample, static_argnames=("settings", "size"))


def summarise(metrics: list[dict]) -> dict[str, float]:
    """Means, over all pictures of several batches, of what `Stage.loss` returned, as plain floats.

    A bucket that no picture fell into gives NaN. Other entries are averaged over batches.
    """
    sums = sum(m["bucket_sum"] for m in metrics)
    counts = sum(m["bucket_count"] for m in metrics)
    edges = (-20.0, *BUCKET_EDGES, 20.0)
    values = {
        name: float(sum(m[name] for m in metrics) / len(metrics))
        for name in metrics[0]
        if not name.startswith("bucket_")
    }
    values["loss"] = float(sums.sum() / counts.sum())
    for low, high, total, count in zip(edges, edges[1:], sums, counts, strict=False):
        values[f"loss_logsnr_{low:g}_{high:g}"] = float(total / count) if count else float("nan")
    return values
