"""A DeepFloyd IF U-Net's config.json as keys of our stage section, and back.

Names, defaults and meanings are those of diffusers 0.42's `UNet2DConditionModel`.

Writing is the inverse of reading. What diffusers can't express shows in that the description
written reads back as another network; `cascade.interop.diffusers_folder` looks for that.
"""

import math
from collections.abc import Mapping
from typing import Any

from cascade.interop.description import Description

BLOCKS = {  # (down, up) -> whether the level's pixels attend
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"): False,
    ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"): True,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
TEXT_NORMS = {None: "none", "group_norm": "group"}

STATED = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "mid_block_type",
    "resnet_time_scale_shift",
)
MAPPED = {  # key -> default
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "cross_attention_dim": 1280,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
}
BUILT = {  # key -> the only value that is built here
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}

MOST_LEVELS, MOST_BLOCKS = 10, 100  # blocks of a level; IF-XL has 4 levels of 3


def read(where: str, description: Mapping[str, Any], super_resolution: bool) -> dict[str, Any]:
    """What a U-Net's config.json says, as keys of a stage section, `network` among them.

    `network` lacks what isn't told there: `noise_embedding`, and how to compute it.

    Args:
      where: the file, for messages.
      super_resolution: it must take a low-resolution picture, or must not.

    Raises:
      UserError: naming an option that isn't built here.
    """
    d = Description(where, description, stated=STATED, mapped=MAPPED, built=BUILT)
    d.one_of("in_channels", (6 if super_resolution else 3,))
    widths = _widths(d)
    levels, unit = len(widths), math.gcd(*widths)
    attends = _attending(d, levels)
    only_text = d.per_level("only_cross_attention", bool, levels)
    scale = d.number("resnet_out_scale_factor", float, 1e-3)
    d.one_of("mid_block_scale_factor", (scale,))
    aug = {None: False, "timestep": True} if super_resolution else {None: False}
    time_dim = d["time_embedding_dim"]
    text_width, text_channels = _text_widths(d)
    return {
        "resolution": d.number("sample_size", int, 1),
        "channels": 3,
        "text_width": text_width,
        "learned_variance": d.one_of("out_channels", {6: True, 3: False}),
        "network": {
            "name": "unet",
            "channels": unit,
            "channel_mults": tuple(width // unit for width in widths),
            "num_blocks": _blocks(d, levels),
            "patch": 1,
            "strides": (1,) + (2,) * (levels - 1),
            "resampling": "block",
            "skips": "block",
            "entry_skips": True,
            "skip_scale": 1.0,
            "residual_scale": 1.0 / scale,
            "middle": True,
            "middle_attention": (not _middle_only_text(d), True),
            "self_attention": tuple(
                each and not only for each, only in zip(attends, only_text, strict=True)
            ),
            "text_attention": attends,
            "attention_per_block": True,
            "head_channels": _head_channels(d, attends),
            "text_channels": text_channels,
            "text_norm": d.one_of("cross_attention_norm", TEXT_NORMS),
            "pool_heads": _pool_heads(d),
            "pool_projected": False,
            "embed_aug": d.one_of("class_embed_type", aug),
            "embed_guidance": False,
            "embedding_channels": 0 if time_dim is None else d.number("time_embedding_dim", int, 1),
            "embedding_activations": _embedding_activations(d),
            "norm_groups": d.number("norm_num_groups", int, 1),
            "activation": d.one_of("act_fn", ACTIVATIONS),
            "dropout": d.number("dropout", float, 0.0),
        },
    }


def _widths(d: Description) -> tuple[int, ...]:
    """Channels of each level, which say how many levels there are."""
    widths = d["block_out_channels"]
    positive = isinstance(widths, list | tuple) and all(
        type(width) is int and width > 0 for width in widths
    )
    if not positive or not 0 < len(widths) <= MOST_LEVELS:
        raise d.refusal("block_out_channels", f"a list of 1 to {MOST_LEVELS} positive numbers")
    return tuple(widths)


def _blocks(d: Description, levels: int) -> tuple[int, ...]:
    """Blocks of each level."""
    blocks = d.per_level("layers_per_block", int, levels)
    if not all(1 <= each <= MOST_BLOCKS for each in blocks):
        raise d.refusal("layers_per_block", f"1 to {MOST_BLOCKS} a level")
    return blocks


def _attending(d: Description, levels: int) -> tuple[bool, ...]:
    """Which levels attend, from their block types down and up."""
    down = d.per_level("down_block_types", str, levels)
    up = d.per_level("up_block_types", str, levels)
    for pair in zip(down, reversed(up), strict=True):
        if pair[0] not in {known for known, _ in BLOCKS}:
            raise d.refusal("down_block_types", " or ".join(known for known, _ in BLOCKS))
        if pair not in BLOCKS:
            raise d.refusal("up_block_types", "the counterpart of down_block_types, reversed,")
    return tuple(BLOCKS[pair] for pair in zip(down, reversed(up), strict=True))


def _middle_only_text(d: Description) -> bool:
    """Whether the middle attends to text alone; unless told, as the levels if they are as one."""
    if d["mid_block_only_cross_attention"] is None:
        return d["only_cross_attention"] is True
    return d.one_of("mid_block_only_cross_attention", (False, True))


def _head_channels(d: Description, attends: tuple[bool, ...]) -> int:
    """The one width of attention heads; a level that doesn't attend may state another."""
    each = d.per_level("attention_head_dim", int, len(attends))
    # The middle works at the last level, and always attends.
    used = {width for width, at in zip(each, (*attends[:-1], True), strict=True) if at}
    if len(used) != 1 or min(used) < 1:
        raise d.refusal("attention_head_dim", "one positive number for all levels that attend")
    return used.pop()


def _text_widths(d: Description) -> tuple[int, int]:
    """Width of the text given, and of its projection; 0 where there is none."""
    width = d.number("cross_attention_dim", int, 1)
    if d["encoder_hid_dim"] is None:
        d.one_of("encoder_hid_dim_type", (None,))
        return width, 0
    d.one_of("encoder_hid_dim_type", (None, "text_proj"))
    return d.number("encoder_hid_dim", int, 1), width


def _pool_heads(d: Description) -> int:
    """Heads of the pooling of text; 0 where there is none, whatever number is stated."""
    heads = d.number("addition_embed_type_num_heads", int, 1)
    return heads if d.one_of("addition_embed_type", {None: False, "text": True}) else 0


def _embedding_activations(d: Description) -> tuple[str, ...]:
    """What the embedding passes: an activation of its own, then, unless skipped, the blocks'."""
    own = d.one_of("time_embedding_act_fn", {None: None, **ACTIVATIONS})
    skipped = d.one_of("resnet_skip_time_act", (False, True))
    blocks = None if skipped else d.one_of("act_fn", ACTIVATIONS)
    return tuple(activation for activation in (own, blocks) if activation is not None)


def write(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a stage's U-Net, or of the nearest that diffusers can express.

    Args:
      stage: a stage section.
    """
    network = stage["network"]
    width = network["channels"]
    own, skipped = _written_activations(network)
    blocks = {attends: pair for pair, attends in BLOCKS.items()}
    pairs = [blocks[attends] for attends in network["text_attention"]]
    text_channels, pool_heads = network["text_channels"], network["pool_heads"]
    levels = zip(network["self_attention"], network["text_attention"], strict=True)
    scale = 1.0 / (network["residual_scale"] or 1.0)
    return {
        "_class_name": "UNet2DConditionModel",
        **BUILT,
        "sample_size": stage["resolution"],
        "in_channels": stage["channels"] * (2 if stage["lowres_resolution"] else 1),
        "out_channels": stage["channels"] * (2 if stage["learned_variance"] else 1),
        "block_out_channels": [width * mult for mult in network["channel_mults"]],
        "down_block_types": [down for down, _ in pairs],
        "up_block_types": [up for _, up in reversed(pairs)],
        "layers_per_block": list(network["num_blocks"]),
        "act_fn": network["activation"],
        "addition_embed_type": "text" if pool_heads else None,
        "addition_embed_type_num_heads": pool_heads or MAPPED["addition_embed_type_num_heads"],
        "attention_head_dim": network["head_channels"],
        "class_embed_type": "timestep"
        if stage["lowres_resolution"] and network["embed_aug"]
        else None,
        "cross_attention_dim": text_channels or stage["text_width"],
        "cross_attention_norm": "group_norm" if network["text_norm"] == "group" else None,
        "dropout": network["dropout"],
        "encoder_hid_dim": stage["text_width"] if text_channels else None,
        "encoder_hid_dim_type": "text_proj" if text_channels else None,
        "only_cross_attention": [text and not pixels for pixels, text in levels],
        "mid_block_only_cross_attention": not network["middle_attention"][0],
        "mid_block_scale_factor": scale,
        "resnet_out_scale_factor": scale,
        "norm_num_groups": network["norm_groups"],
        "resnet_skip_time_act": skipped,
        "time_embedding_act_fn": own,
        "time_embedding_dim": network["embedding_channels"] or None,
    }


def _written_activations(network: Mapping[str, Any]) -> tuple[str | None, bool]:
    """`time_embedding_act_fn` and `resnet_skip_time_act`, the inverse of reading them."""
    activations = tuple(network["embedding_activations"])
    skipped = activations[-1:] != (network["activation"],)
    own = activations if skipped else activations[:-1]
    return (own[0] if own else None), skipped
