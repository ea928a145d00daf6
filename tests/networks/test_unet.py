"""Laws of the U-Net: shapes, what text and conditions may and must change, equal spellings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.diffusion.schedules import timestep_logsnrs
from cascade.errors import UserError
from cascade.networks import NETWORKS, UNet
from cascade.networks.attention import Attention, attend
from cascade.networks.layers import (
    GroupNorm,
    NoiseEmbedding,
    ResidualBlock,
    Style,
    enlarge,
    pixel_shuffle,
    shrink,
)
from cascade.registry import check

BASE = {
    "out_channels": 3,
    "super_resolution": False,
    "patch": 1,
    "channels": 8,
    "channel_mults": (1, 2),
    "num_blocks": (1, 2),
    "strides": (1, 2),
    "resampling": "block",
    "skips": "block",
    "entry_skips": True,
    "skip_scale": 1.0,
    "residual_scale": 1.0,
    "middle": True,
    "middle_attention": (True, True),
    "self_attention": (False, True),
    "text_attention": (False, True),
    "attention_per_block": True,
    "head_channels": 8,
    "attention_implementation": "auto",
    "text_channels": 0,
    "text_norm": "layer",
    "pool_heads": 2,
    "pool_projected": True,
    "noise_embedding": "logsnr",
    "embed_aug": True,
    "embed_guidance": False,
    "embedding_channels": 0,
    "embedding_activations": ("silu",),
    "norm_groups": 4,
    "activation": "silu",
    "dropout": 0.0,
    "dtype": "float32",
    "remat": "none",
    "scan_blocks": False,
}
EFFICIENT = BASE | {
    "super_resolution": True,
    "num_blocks": (1, 3),
    "strides": (2, 2),
    "resampling": "shuffle",
    "entry_skips": False,
    "skip_scale": 2**-0.5,
    "middle": False,
    "self_attention": (False, False),
    "attention_per_block": False,
}
FIELDS = {"base": BASE, "efficient": EFFICIENT}
# One level, for gradients, which compile slowly: a block down, and two equal ones up.
SMALL = BASE | {
    "channel_mults": (1,),
    "num_blocks": (1,),
    "strides": (2,),
    "middle": False,
    "self_attention": (True,),
    "text_attention": (True,),
}


def inputs(height=8, width=12, batch=2, out=3, text_width=6):
    """A batch whose first text is half padding and whose second is empty."""
    keys = jax.random.split(jax.random.key(0), 5)
    cond = {
        "text_emb": jax.random.normal(keys[0], (batch, 4, text_width)),
        "text_mask": jnp.arange(4) < jnp.array([2, 0])[:batch, None],
        "lowres": jax.random.normal(keys[1], (batch, height // 2, width // 2, 3)),
        "aug_logsnr": jnp.array([-3.0, 5.0])[:batch],
    }
    z_t = jax.random.normal(keys[2], (batch, height, width, 3))
    return z_t, jnp.array([1.0, -7.0])[:batch], cond


def drawn(network, *args):
    """Random parameters, with nothing left at zero, so that every branch shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(network.init, jax.random.key(0), *args)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(fields, *args):
    network = UNet(**fields)
    return jax.jit(network.apply)(drawn(network, *args), *args)


@functools.cache
def prepared(name):
    """apply(z_t, logsnr, cond) of one of FIELDS; what's called alike compiles once."""
    network = UNet(**FIELDS[name])
    return functools.partial(jax.jit(network.apply), drawn(network, *inputs()))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These networks are tiny: compiling them well takes longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@settings(max_examples=10, deadline=None)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    strides=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    resampling=st.sampled_from(["block", "nearest", "shuffle"]),
    attention=st.tuples(*[st.booleans()] * 4),
    flags=st.tuples(*[st.booleans()] * 5),
    out_channels=st.sampled_from([3, 6]),
    text=st.tuples(st.sampled_from([0, 4]), st.sampled_from([0, 2])),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_shape_is_the_pictures(
    height, width, strides, resampling, attention, flags, out_channels, text, dtype
):
    entry_skips, middle, attention_per_block, super_resolution, scan_blocks = flags
    network = UNet(
        **BASE
        | {
            "strides": strides,
            "resampling": resampling,
            "self_attention": attention[:2],
            "text_attention": attention[2:],
            "entry_skips": entry_skips,
            "middle": middle,
            "attention_per_block": attention_per_block,
            "super_resolution": super_resolution,
            "scan_blocks": scan_blocks,
            "out_channels": out_channels,
            "text_channels": text[0],
            "pool_heads": text[1],
            "dtype": dtype,
        }
    )
    args = inputs(2 * height, 2 * width)
    args[2]["lowres"] = jnp.zeros((2, 3, 5, 3))
    out, variables = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), *args))
    assert out.shape == (*args[0].shape[:3], out_channels)
    assert out.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_a_size_that_the_strides_do_not_divide_is_padded_and_cropped():
    """As if the picture's last row and column had been repeated, its condition's too."""
    z_t, logsnr, cond = inputs(6, 10)
    cond["lowres"] = jax.random.normal(jax.random.key(1), z_t.shape)
    out = prepared("efficient")(z_t, logsnr, cond)
    assert out.shape == z_t.shape

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 2), (0, 2), (0, 0)), "edge")

    whole = prepared("efficient")(pad(z_t), logsnr, cond | {"lowres": pad(cond["lowres"])})
    np.testing.assert_allclose(out, whole[:, :6, :10], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [BASE, EFFICIENT])
def test_output_is_zero_at_birth(fields):
    args = inputs()
    network = UNet(**fields)
    last = jax.jit(lambda key: network.init(key, *args)["params"]["conv_out"])(jax.random.key(0))
    variables = drawn(network, *args)
    variables["params"]["conv_out"] = last
    assert not np.any(jax.jit(network.apply)(variables, *args))


@pytest.mark.parametrize("name", FIELDS)
def test_padding_and_empty_text(name):
    """Content outside the mask changes nothing; text inside it, or clearing the mask, does."""
    z_t, logsnr, cond = inputs()
    apply = prepared(name)
    plain = apply(z_t, logsnr, cond)
    mask = cond["text_mask"]
    kept = jnp.where(mask[..., None], cond["text_emb"], 0)
    wild = jnp.where(mask[..., None], cond["text_emb"], jnp.inf)
    for text_emb in (kept, wild):
        np.testing.assert_array_equal(plain, apply(z_t, logsnr, cond | {"text_emb": text_emb}))
    null = cond | {"text_mask": jnp.zeros_like(mask)}
    dropped = apply(z_t, logsnr, null)
    zeroed = apply(z_t, logsnr, null | {"text_emb": jnp.zeros_like(kept)})
    np.testing.assert_array_equal(dropped, zeroed)
    np.testing.assert_array_equal(dropped[1], plain[1])
    assert np.abs(dropped[0] - plain[0]).max() > 1e-3
    assert np.isfinite(plain).all()


def test_attention_over_nothing_is_zero_with_finite_gradients():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    mask = jnp.array([[True, True, False, False, True], [False] * 5])
    for implementation in ("auto", "xla"):
        out = attend(q, k, v, mask, implementation)
        assert not np.any(out[1])
        logits = np.einsum("tnd,snd->nts", q[0], k[0])[..., mask[0]] / 2
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = np.einsum("nts,snd->tnd", weights, v[0, mask[0]])
        np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-6)
        gradient = jax.grad(
            lambda q, k, v, how=implementation: attend(q, k, v, mask, how).sum(), (0, 1, 2)
        )
        gradients = jax.jit(gradient)(q, k, v)
        assert all(np.isfinite(g).all() and not np.any(g[1]) for g in gradients)


def stacked(params):
    """Parameters of single blocks as a scanning network, whose tree is `like`, holds them."""

    def stack(tree, like):
        if not isinstance(like, dict):
            return tree
        out = {}
        for name, sub in like.items():
            scanned = re.fullmatch(r"blocks_(\d+)_(\d+)", name)
            if scanned:
                first, last = map(int, scanned.groups())
                blocks = [tree[f"block_{j}"] for j in range(first, last + 1)]
                out[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
            else:
                out[name] = stack(tree[name], sub)
        return out

    return stack(*params)


@pytest.mark.parametrize(
    "remat, scan_blocks", [("blocks", True), ("dots", False), ("offload", True), ("none", True)]
)
def test_remat_and_scan_change_nothing(remat, scan_blocks):
    """Same loss, same gradients, on the same parameters."""
    args = inputs()
    plain = UNet(**SMALL)
    other = UNet(**SMALL | {"remat": remat, "scan_blocks": scan_blocks})
    variables = drawn(plain, *args)
    like = jax.eval_shape(other.init, jax.random.key(0), *args)
    assert ("blocks_0_1" in like["params"]["up_0"]) == scan_blocks

    def loss(network):
        return jax.jit(
            jax.value_and_grad(lambda v: jnp.mean(jnp.square(network.apply(v, *args) - 1)))
        )

    loss_plain, gradients_plain = loss(plain)(variables)
    loss_other, gradients_other = loss(other)(stacked((variables, like)))
    np.testing.assert_allclose(loss_plain, loss_other, rtol=1e-5)
    expected = stacked((gradients_plain, like))
    for (path, a), (_, b) in zip(leaves_of(expected), leaves_of(gradients_other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=str(path))


def leaves_of(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_dropout_acts_in_training_alone():
    args = inputs()
    network = UNet(**SMALL | {"dropout": 0.5, "scan_blocks": True, "remat": "blocks"})
    variables = drawn(network, *args)
    apply = jax.jit(network.apply, static_argnames="deterministic")
    first, again, second = (
        apply(variables, *args, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(apply(variables, *args), apply(variables, *args))


@pytest.mark.parametrize("name", FIELDS)
def test_bfloat16_is_near_float32(name):
    wide = prepared(name)(*inputs())
    narrow = run(FIELDS[name] | {"dtype": "bfloat16"}, *inputs())
    error = np.sqrt(np.mean(np.square(wide - narrow)) / np.mean(np.square(wide)))
    assert 0 < error < 0.03


@pytest.mark.parametrize("key", ["lowres", "aug_logsnr"])
def test_super_resolution_conditions_matter(key):
    z_t, logsnr, cond = inputs()
    plain, changed = (
        prepared("efficient")(z_t, logsnr, each) for each in (cond, cond | {key: cond[key] + 1})
    )
    assert np.abs(plain - changed).max() > 0


def test_lowres_is_seen_at_the_pictures_size():
    """A picture enlarged beforehand is the same condition."""
    z_t, logsnr, cond = inputs()
    large = jax.image.resize(cond["lowres"], z_t.shape, "bilinear")
    small_out, large_out = (
        prepared("efficient")(z_t, logsnr, each) for each in (cond, cond | {"lowres": large})
    )
    np.testing.assert_allclose(small_out, large_out, rtol=1e-4, atol=1e-5)


def test_pictures_of_a_batch_are_independent():
    both = prepared("base")(*inputs())
    one = prepared("base")(*jax.tree.map(lambda a: a[:1], inputs()))
    np.testing.assert_allclose(both[:1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["logsnr", "squaredcos_cap_v2", "linear"])
def test_noise_embedding_tells_all_of_its_range_apart(scale):
    """Features keep unit scale on [-20, 20] and neighbours of a 1000-step schedule differ."""
    logsnr = jnp.linspace(-20, 20, 1001)
    if scale != "logsnr":
        logsnr = timestep_logsnrs(scale, 1000)
    module = NoiseEmbedding(scale, 32, 64, "silu")
    out, _ = jax.jit(module.init_with_output)(jax.random.key(0), logsnr)
    distance = np.linalg.norm(out[:, None] - out[None], axis=-1)
    assert distance[~np.eye(len(logsnr), dtype=bool)].min() > 1e-2
    assert 0.1 < out.std() < 2


def test_group_norm_by_hand():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
    scale, shift = jax.random.normal(jax.random.key(1), (2, 2, 8))
    module = GroupNorm(4, jnp.float32)
    y = module.apply(module.init(jax.random.key(0), x), x, (scale, shift))
    grouped = np.asarray(x, np.float64).reshape(2, 4, 6, 4, 2)
    mean, var = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    normal = ((grouped - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(
        y, normal * (1 + scale[:, None, None]) + shift[:, None, None], rtol=1e-4, atol=1e-5
    )


def test_resampling_places_pixels():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
    large = enlarge(x, 2)
    np.testing.assert_array_equal(large[:, 3, 6], x[:, 1, 3])
    np.testing.assert_allclose(shrink(large, 2), x, rtol=1e-6)
    shuffled = pixel_shuffle(x, 2)
    assert shuffled.shape == (2, 6, 10, 2)
    np.testing.assert_array_equal(shuffled[:, 3, 6], x[:, 1, 3, 4:6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": (1,)}, "num_blocks has 1 items"),
        ({"strides": (1, 3)}, "strides"),
        ({"resampling": "transposed"}, "resampling is 'transposed'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"norm_groups": 3}, "norm_groups 3"),
        ({"head_channels": 5}, "head_channels 5"),
        ({"pool_heads": 4}, "pool_heads 4"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        UNet(**BASE | change).init(jax.random.key(0), *inputs())


@pytest.mark.parametrize("size", [(8, 13), (7, 8), (0, 8)])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(UserError, match=f"{size[0]}×{size[1]}.*multiples of 2"):
        UNet(**EFFICIENT).init(jax.random.key(0), jnp.zeros((1, *size, 3)), *inputs()[1:])


def test_missing_conditions_are_named():
    z_t, logsnr, cond = inputs()
    for key in cond:
        less = {k: v for k, v in cond.items() if k != key}
        with pytest.raises(UserError, match=f"'{key}' is missing"):
            UNet(**EFFICIENT).init(jax.random.key(0), z_t, logsnr, less)


def test_fields_are_a_config_section():
    section = {"name": "unet", **BASE}
    supplied = {key: section.pop(key) for key in ("out_channels", "super_resolution")}
    supplied["layout"] = None
    assert check("network", NETWORKS, section, supplied=tuple(supplied)) is UNet


def parameters_of(network) -> dict:
    """Paths and shapes of a network's parameters."""
    tree = jax.eval_shape(network.init, jax.random.key(0), *inputs())["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): a.shape for p, a in leaves}


def test_options_of_other_families_show_in_the_parameters():
    """Pooling before the projection, a wider embedding, a middle of its own, no known noise."""
    plain = parameters_of(UNet(**EFFICIENT | {"middle": True, "text_channels": 32}))
    other = EFFICIENT | {
        "middle": True,
        "middle_attention": (False, True),
        "text_channels": 32,
        "text_norm": "group",
        "pool_projected": False,
        "embedding_channels": 24,
        "embed_aug": False,
    }
    other = parameters_of(UNet(**other))
    assert plain["text_pool/query"] == (32,) and other["text_pool/query"] == (6,)
    assert plain["logsnr_embedding/dense_out/kernel"] == (32, 32)
    assert other["logsnr_embedding/dense_out/kernel"] == (24, 24)
    assert "middle/block_0/attention/qkv/kernel" in plain
    assert "middle/block_0/attention/q/kernel" in other
    assert "middle/block_0/attention/qkv/kernel" not in other
    assert any(path.startswith("aug_embedding") for path in plain)
    assert not any(path.startswith("aug_embedding") for path in other)


def test_residual_scale_multiplies_the_block():
    x, emb = jax.random.normal(jax.random.key(0), (2, 4, 4, 8)), jnp.ones((2, 6))
    style = Style(4, "gelu", 0.0, 8, "xla", "layer", 1.0, 1.0, jnp.float32, True, None)
    plain = ResidualBlock(12, style)
    params = drawn(plain, x, emb)
    scaled = ResidualBlock(12, style._replace(residual_scale=0.7071)).apply(params, x, emb)
    np.testing.assert_allclose(scaled, 0.7071 * plain.apply(params, x, emb), rtol=1e-5, atol=1e-6)


def test_group_norm_of_text_is_over_all_tokens():
    """Shifting and scaling a whole text changes nothing, scaling one of its tokens does."""
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    words = jax.random.normal(jax.random.key(1), (1, 5, 64))
    mask = jnp.ones((1, 5), bool)
    style = Style(4, "gelu", 0.0, 8, "xla", "group", 1.0, 1.0, jnp.float32, True, None)
    attention = Attention(False, True, style)
    params = drawn(attention, x, (words, mask))
    out = attention.apply(params, x, (words, mask))
    again = attention.apply(params, x, (5.0 * words + 3.0, mask))
    np.testing.assert_allclose(out, again, rtol=1e-4, atol=1e-4)
    louder = words.at[0, 0].mul(9.0)  # which a norm of each token by itself wouldn't show
    assert np.abs(out - attention.apply(params, x, (louder, mask))).max() > 1e-3


@pytest.mark.parametrize("over_pixels", [False, True])
def test_group_norm_of_text_is_blind_to_padding(over_pixels):
    """Neither what padding holds nor how much of it there is changes anything."""
    x = jax.random.normal(jax.random.key(0), (2, 2, 2, 8))
    words = jax.random.normal(jax.random.key(1), (2, 5, 64))
    mask = jnp.array([[True, True, True, False, False], [False] * 5])
    style = Style(4, "gelu", 0.0, 8, "xla", "group", 1.0, 1.0, jnp.float32, True, None)
    attention = Attention(over_pixels, True, style)
    params = drawn(attention, x, (words, mask))
    out = attention.apply(params, x, (words, mask))
    padded = jnp.where(mask[..., None], words, 1e3)
    np.testing.assert_allclose(attention.apply(params, x, (padded, mask)), out, rtol=1e-5)
    short = attention.apply(params, x, (words[:, :3], mask[:, :3]))
    np.testing.assert_allclose(short, out, rtol=1e-5, atol=1e-6)


def test_group_norm_of_text_needs_whole_groups():
    with pytest.raises(UserError, match="32 groups"):
        parameters_of(UNet(**BASE | {"text_norm": "group"}))
