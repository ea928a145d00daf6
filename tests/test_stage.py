"""What a stage does with its conditions: text, null text, low-resolution input, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_cascade import WordEncoder, stage_config, trained

from cascade.errors import UserError
from cascade.stage import Stage, summarise

BATCH = 6


def batch_of(stage, seed=0):
    rng = np.random.default_rng(seed)
    image, _, cond = stage.shapes(BATCH)
    batch = {
        "image": rng.uniform(-1, 1, image.shape).astype(np.float32),
        "text_emb": rng.normal(size=cond["text_emb"].shape).astype(np.float32),
        "text_mask": np.ones(cond["text_mask"].shape, bool),
    }
    if "lowres" in cond:
        batch["lowres"] = rng.uniform(-1, 1, cond["lowres"].shape).astype(np.float32)
    return batch


def with_drop(rate, null_text=None, resolution=8, lowres=0):
    stage, params, _ = trained(stage_config(resolution, lowres))
    config = stage.config.copy_and_resolve_references()
    config.text_drop = rate
    return Stage(config, null_text), params


def test_dropped_text_is_the_null_condition_and_zero_text():
    stage, params = with_drop(1.0)
    batch, key = batch_of(stage), jax.random.key(0)
    dropped, _ = stage.loss(params, batch, key)
    zeroed = {
        **batch,
        "text_emb": np.zeros_like(batch["text_emb"]),
        "text_mask": np.zeros_like(batch["text_mask"]),
    }
    kept = with_drop(0.0)[0]
    assert float(dropped) == float(kept.loss(params, zeroed, key)[0])
    assert float(dropped) != float(kept.loss(params, batch, key)[0])
    # A cleared mask hides whatever the embeddings hold.
    hidden = {**zeroed, "text_emb": batch["text_emb"]}
    assert float(dropped) == float(kept.loss(params, hidden, key)[0])


def test_the_encoders_own_null_is_what_training_drops_to():
    null = WordEncoder().null()
    stage, params = with_drop(1.0, null)
    batch, key = batch_of(stage), jax.random.key(0)
    replaced = {
        **batch,
        "text_emb": np.broadcast_to(null[0], batch["text_emb"].shape),
        "text_mask": np.broadcast_to(null[1], batch["text_mask"].shape),
    }
    kept = with_drop(0.0)[0]
    assert float(stage.loss(params, batch, key)[0]) == pytest.approx(
        float(kept.loss(params, replaced, key)[0]), rel=1e-6
    )


def test_evaluation_drops_no_text():
    always, params = with_drop(1.0)
    never, _ = with_drop(0.0)
    batch, key = batch_of(always), jax.random.key(0)
    one, other = (s.loss(params, batch, key, train=False)[0] for s in (always, never))
    assert float(one) == float(other)


def test_padding_changes_nothing():
    stage, params = with_drop(0.0)
    batch, key = batch_of(stage), jax.random.key(0)
    valid = np.array([True, False, True, True, False, True])
    loss, metrics = stage.loss(params, {**batch, "valid": valid}, key)
    scrambled = {**batch, "image": np.where(valid[:, None, None, None], batch["image"], 0.5)}
    again, _ = stage.loss(params, {**scrambled, "valid": valid}, key)
    assert float(loss) == float(again)
    assert float(metrics["bucket_count"].sum()) == valid.sum()


def test_summary_weighs_pictures_not_batches():
    rows = [
        {"loss": 1.0, "bucket_sum": np.array([1.0, 3.0]), "bucket_count": np.array([1.0, 3.0])},
        {"loss": 9.0, "bucket_sum": np.array([9.0, 0.0]), "bucket_count": np.array([1.0, 0.0])},
    ]
    values = summarise(rows)
    assert values["loss"] == pytest.approx(13 / 5)
    assert values["loss_logsnr_-20_-12"] == 5.0


def sampled(stage, params, lowres, **settings):
    rng = np.random.default_rng(3)
    cond = {
        "text_emb": jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32),
        "text_mask": jnp.ones((2, 4), bool),
        "lowres": jnp.asarray(lowres),
    }
    null = {"text_emb": jnp.zeros((2, 4, 8)), "text_mask": jnp.zeros((2, 4), bool)}
    keys = jax.random.split(jax.random.key(1), 2)
    size = (lowres.shape[1] * 2, lowres.shape[2] * 2)
    return np.asarray(stage.draw(params, cond, null, keys, stage.settings(**settings), size))


def test_a_super_resolution_stage_reads_its_input_and_its_level():
    stage, params, _ = trained(stage_config(16, 8))
    low = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    clean = sampled(stage, params, low, aug_level=0.0)
    assert clean.shape == (2, 16, 16, 3) and np.abs(clean).max() <= 1.0
    assert not np.array_equal(clean, sampled(stage, params, -low, aug_level=0.0))
    assert not np.array_equal(clean, sampled(stage, params, low, aug_level=0.5))
    # At level 1 nothing of the input is left but the cosine schedule's exp(-10) of it.
    drowned = sampled(stage, params, low, aug_level=1.0)
    np.testing.assert_allclose(drowned, sampled(stage, params, -low, aug_level=1.0), atol=2e-2)


def test_tiles_draw_what_the_whole_does_where_one_suffices():
    stage, params, _ = trained(stage_config(16, 8))
    low = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    whole = sampled(stage, params, low)
    np.testing.assert_array_equal(sampled(stage, params, low, tile=16, tile_overlap=4), whole)
    tiled = sampled(stage, params, low, tile=8, tile_overlap=4)
    assert tiled.shape == whole.shape and np.isfinite(tiled).all()
    assert not np.array_equal(tiled, whole)


@pytest.mark.parametrize(
    ("lowres", "tile", "overlap", "said"),
    [
        (0, 7, 2, "tile is 7, not a multiple of 2"),
        (4, 6, 4, "tile is 6, not a multiple of 4"),
        (8, 8, 3, "tile_overlap is 3, not a multiple of 2"),
        (6, 8, 2, "not by a whole factor"),
    ],
)
def test_tiles_that_can_not_be_drawn_are_refused_before_training(lowres, tile, overlap, said):
    config, sampling = stage_config(16, lowres), {"tile": tile, "tile_overlap": overlap}
    drawable = Stage(config)
    with pytest.raises(UserError, match=said):
        drawable.settings(**sampling)
    config.sampling.update(sampling)
    with pytest.raises(UserError, match=said):
        Stage(config)


def test_tiles_of_what_was_enlarged_before_its_noise_may_overlap_by_any():
    config = stage_config(16, 8, lowres_upsampling="before_noise")
    assert Stage(config).settings(tile=8, tile_overlap=3).tile_overlap == 3


def test_augmentation_is_drawn_for_each_example(monkeypatch):
    stage, params, _ = trained(stage_config(16, 8))
    seen = {}
    network = type(stage.network)

    def spy(self, variables, z_t, logsnr, cond, *rest, **options):
        seen.update(cond)
        return jnp.zeros((*z_t.shape[:3], 3))

    monkeypatch.setattr(network, "apply", spy)
    stage.loss(params, batch_of(stage), jax.random.key(0))
    assert len(np.unique(seen["aug_logsnr"])) == BATCH


@pytest.mark.parametrize("size", [(7, 8), (8, 0), (-2, 8)])
def test_sizes_that_cant_be_drawn(size):
    with pytest.raises(UserError, match="multiples of"):
        Stage(stage_config(8, 0)).check_size(size)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"guidance": float("nan")},
        {"aug_level": 1.5},
        {"stepz": 3},
        {"tile_overlap": 8, "tile": 8},
        {"spacing": {"name": "given", "levels": (-1.0, 1.0)}},
        {"spacing": {"name": "karras", "rho": 7.0, "sigma_min": 0.0, "sigma_max": 1e9}},
        {"guidance_schedule": {"name": "interval", "low": 1.0, "high": 1.0}},
        {"guidance_schedule": {"name": "oscillating", "steps": -1, "low": 1.0}},
        {"sampler": {"name": "addim", "eta": 2.0, "variance": 0.5}},
        {"searched": (("ddim", (1.0, -1.0)),)},
    ],
)
def test_settings_out_of_range(change):
    with pytest.raises(UserError, match=next(iter(change))[:5]):
        Stage(stage_config(8, 0)).settings(**change)


def test_a_guidance_schedule_follows_the_levels_that_are_drawn(monkeypatch):
    stage = Stage(stage_config(8, 0))

    def network(variables, z_t, logsnr, cond):
        """v that a text turns round."""
        told = cond["text_mask"].any(1)[:, None, None, None]
        return jnp.where(told, 0.3 * z_t, -0.1 * z_t)

    monkeypatch.setattr(type(stage.network), "apply", lambda self, *args: network(*args))
    conds = [{"text_emb": jnp.zeros((2, 4, 8)), "text_mask": jnp.full((2, 4), b)} for b in (1, 0)]
    ways = {
        "constant": {"name": "constant"},
        "always": {"name": "oscillating", "steps": 9, "low": 0.0},
        "first high": {"name": "oscillating", "steps": 1, "low": 1.0},
        "first low": {"name": "oscillating", "steps": 0, "low": 1.0},
        "first alone": {"name": "interval", "low": -30.0, "high": -2.0},
    }
    drawn = {}
    for way, schedule in ways.items():
        settings = stage.settings(
            sampler={"name": "ddim"}, steps=2, guidance=3.0, guidance_schedule=schedule
        )
        keys = jax.random.split(jax.random.key(0), 2)
        drawn[way] = stage.sample({}, *conds, keys, settings, (8, 8))
    # Of two uniform steps the first is evaluated at logsnr -20, the second at 0.
    np.testing.assert_array_equal(drawn["constant"], drawn["always"])
    np.testing.assert_array_equal(drawn["first high"], drawn["first alone"])
    for one, other in [("constant", "first high"), ("constant", "first low")]:
        assert np.abs(drawn[one] - drawn[other]).max() > 0.01
    assert np.abs(drawn["first high"] - drawn["first low"]).max() > 0.01
