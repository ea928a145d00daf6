"""The full-size configs: what they cost by hand, that their states take shape, that they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import whole

from cascade import config
from cascade.describe import describe
from cascade.errors import UserError
from cascade.networks.cost import describe as level_costs
from cascade.schema import SCHEMA
from cascade.stage import Stage
from cascade.training.optim import make_optimizer
from cascade.training.state import TrainState, init_state, make_train_step

NAMES = ("base64_2b", "base64_400m", "sr256_600m", "sr1024_400m")
STAGES = ("base64_2b", "sr256_600m", "sr1024_400m")
CASCADE = "configs/imagen/cascade.py"
# A program that runs twice needn't be quick, but quickly made.
COMPILED = {"xla_backend_optimization_level": 0}
# NVIDIA's JAX Imagen, TFLOP a training picture: three forward passes, SR on 256×256.
PUBLISHED = {"base64_2b": 4.44, "sr256_600m": 1.73, "sr1024_400m": 1.62}


@functools.cache
def load(name, arg=""):
    return config.load(f"configs/imagen/{name}.py{arg}")


def counted(stage, side):
    rows = level_costs(stage.network, *stage.shapes(1, (side, side)))
    return sum(row.parameters for row in rows), sum(row.flops for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_a_hand_counts(name):
    stage = Stage(load(name).stage)
    side = stage.training_resolution
    parameters, flops = counted(stage, side)
    by_hand = whole(stage.config, side)
    assert parameters == by_hand[0]
    # jax resizes `lowres` by matrices, which no hand would count; all else is the same to the bit.
    assert flops == pytest.approx(by_hand[1], rel=1e-4 if stage.config.lowres_resolution else 1e-12)
    if name in PUBLISHED:
        assert 3 * flops == pytest.approx(PUBLISHED[name] * 1e12, rel=0.1)


def test_a_whole_picture_of_the_last_stage_by_hand():
    stage = Stage(load("sr1024_400m").stage)
    _, flops = counted(stage, 1024)
    assert flops == pytest.approx(whole(stage.config, 1024)[1], rel=1e-3)
    assert flops == pytest.approx(8.61e12, rel=0.1)  # NVIDIA's


@pytest.mark.parametrize("name", NAMES)
def test_full_size_states_take_shape(name):
    loaded = load(name)
    stage, optimizer = Stage(loaded.stage), make_optimizer(loaded.train)
    key = jax.random.key(loaded.seed)
    state = jax.eval_shape(functools.partial(init_state, stage, optimizer), key)
    parameters, _ = whole(loaded.stage, stage.training_resolution)
    held = {
        part: sum(leaf.size for leaf in jax.tree.leaves(getattr(state, part)))
        for part in ("params", "ema_params", "opt_state")
    }
    assert held["params"] == held["ema_params"] == parameters
    if loaded.train.optimizer.name == "adafactor":
        # Rows and columns in place of matrices, where both sides are 128 or more: heads are 64.
        assert held["opt_state"] < 0.3 * parameters
    else:
        assert held["opt_state"] == pytest.approx(2 * parameters, rel=1e-6)


@pytest.mark.parametrize("name", STAGES)
def test_a_full_size_training_step_takes_shape(name):
    """Traced, not run, on the whole batch."""
    loaded = load(name)
    stage, optimizer = Stage(loaded.stage), make_optimizer(loaded.train)
    key = jax.random.key(loaded.seed)
    state = jax.eval_shape(functools.partial(init_state, stage, optimizer), key)
    z_t, _, cond = stage.shapes(loaded.train.batch_size)
    batch = {"image": z_t} | {k: cond[k] for k in cond.keys() - {"aug_logsnr"}}
    after, metrics = jax.eval_shape(
        make_train_step(stage, optimizer, loaded.train), state, batch, key
    )
    assert after == state and metrics["loss"].shape == ()


@functools.cache
def stepped(name):
    """A stage of a few channels with every kind of block, before and after a training step.

    The last stage's pictures are larger than its crops, which smoke versions' are not.

    Returns:
      (stage, batch, the state before, the state after, metrics).
    """
    whole = ["--config.stage.resolution=32", "--config.stage.lowres_resolution=8"]
    loaded = config.load(f"configs/imagen/{name}.py:smoke", whole if name == "sr1024_400m" else [])
    stage, optimizer = Stage(loaded.stage), make_optimizer(loaded.train)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    z_t, _, cond = stage.shapes(2)
    batch = {"image": draw(z_t), "text_emb": draw(cond["text_emb"])}
    batch["text_mask"] = jnp.ones(cond["text_mask"].shape, bool)
    if not stage.is_base:
        batch["lowres"] = draw(cond["lowres"])
    params = jax.tree.map(draw, jax.eval_shape(stage.init, jax.random.key(0)))
    state = TrainState(jnp.int32(0), params, params, jax.jit(optimizer.init)(params))
    # The first step's rate is 0; this one's is the peak.
    train_step = jax.jit(make_train_step(stage, optimizer, loaded.train), compiler_options=COMPILED)
    for _ in range(2):
        after, metrics = train_step(state, batch, jax.random.key(1))
        state, before = after, state
    return stage, batch, before, after, metrics


@pytest.mark.parametrize("name", STAGES)
def test_a_training_step_of_the_narrowed_stage(name):
    _, _, before, after, metrics = stepped(name)
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    still = [
        jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(moved) if not leaf
    ]
    assert not still


@pytest.mark.parametrize("name", STAGES)
def test_a_sampling_step_of_the_narrowed_stage(name):
    """Stages trained on crops draw whole pictures, at once or in tiles of the crops' size."""
    stage, batch, _, after, _ = stepped(name)
    side = stage.config.resolution
    text = {key: batch[key] for key in ("text_emb", "text_mask")}
    null = jax.tree.map(np.zeros_like, text)
    cond, tiles = dict(text), [{}]
    if not stage.is_base:
        cond["lowres"] = np.zeros((2, *(stage.config.lowres_resolution,) * 2, 3), np.float32)
    if stage.config.crop_resolution:
        assert side > stage.training_resolution
        tiles.append({"tile": stage.training_resolution, "tile_overlap": 8})
    keys = jax.random.split(jax.random.key(2), 2)
    for tile in tiles:
        settings = stage.settings(steps=1, **tile)
        drawn = stage.draw(after.params, cond, null, keys, settings, (side, side))
        assert drawn.shape == (2, side, side, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_configs_are_complete(name, arg):
    loaded = load(name, arg)
    assert set(loaded) == set(SCHEMA)
    assert loaded.text.name == ("minilm" if arg else "t5")


@pytest.mark.parametrize("arg", ["", ":smoke"])
def test_the_cascade_is_its_stages_in_order(arg):
    configs = config.load_stages(CASCADE + arg)
    assert list(configs) == ["base", "sr256", "sr1024"]
    low = [loaded.stage.lowres_resolution for loaded in configs.values()]
    high = [loaded.stage.resolution for loaded in configs.values()]
    assert low == [0, *high[:-1]]
    for name, loaded in configs.items():
        assert config.load(f"{CASCADE}:{name}{arg}").to_dict() == loaded.to_dict()


def test_the_smoke_stages_keep_every_kind_of_block():
    for loaded in config.load_stages(CASCADE + ":smoke").values():
        full = load(
            {0: "base64_2b", 4: "sr256_600m"}.get(loaded.stage.lowres_resolution, "sr1024_400m")
        )
        for field in ("resampling", "skips", "entry_skips", "middle", "attention_per_block"):
            assert loaded.stage.network[field] == full.stage.network[field]
        for field in ("self_attention", "text_attention"):
            assert set(loaded.stage.network[field]) == set(full.stage.network[field])
        assert bool(loaded.stage.crop_resolution) == bool(full.stage.crop_resolution)


def test_describe_sums_the_cascade():
    said = describe(config.load_stages(CASCADE + ":smoke"))
    for name in ("base, 4×4", "sr256, 16×16", "sr1024, 64×64", "crop of 16×16"):
        assert name in said
    parameters = [
        int(line.split()[1].replace(",", "")) for line in said.splitlines() if line[:4] == "all "
    ]
    assert len(parameters) == 3 and f"All stages have {sum(parameters):,} parameters" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "is a cascade of base, sr256, sr1024; name the one that you mean, like"),
        (["--config.sr256.stage.lowres_resolution=32"], "config.sr256.stage.lowres_resolution is"),
        (["--config.sr256.text.null=empty_prompt"], "config.sr256.text differs"),
        (["--config.base.train.steps=0"], "Stage 'base': config.train.steps is 0"),
        (["--config.sr512.train.steps=1"], "config.sr512"),
        (["--config.train.steps=1"], "config.train"),
    ],
)
def test_what_a_cascade_cant_be(overrides, said):
    with pytest.raises(UserError) as caught:
        config.load(CASCADE, overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("", "like configs/imagen/cascade.py:base."),
        (":smoke", "like configs/imagen/cascade.py:base:smoke."),
        (":nope", "takes one of base, sr256, sr1024, or smoke, or both in that order"),
        (":smoke:base", "(base:smoke), not 'smoke:base'"),
        (":sr256:nope", "not 'sr256:nope'"),
    ],
)
def test_an_argument_that_names_no_stage_is_told_which_do(arg, said):
    with pytest.raises(UserError) as caught:
        config.load(CASCADE + arg)
    assert said in str(caught.value)
