"""Whether a U-Net's fields, and what it is given, fit one another."""

from cascade.diffusion.schedules import BETAS
from cascade.errors import UserError
from cascade.networks.attention import TEXT_GROUPS
from cascade.networks.layers import ACTIVATIONS
from cascade.networks.levels import BEFORE_POLICIES, REMAT

RESAMPLINGS = ("block", "nearest", "shuffle")
SKIPS = ("block", "level")
TEXT_NORMS = ("layer", "group", "none")
DTYPES = ("float32", "bfloat16")


def check_fields(network) -> None:
    """Raises a UserError where a field has no such value, or fields contradict each other."""
    levels = len(network.channel_mults)
    for field in ("num_blocks", "strides", "self_attention", "text_attention"):
        if len(getattr(network, field)) != levels:
            raise UserError(
                f"The network's {field} has {len(getattr(network, field))} items but "
                f"channel_mults has {levels}; give one item a level."
            )
    choices = {
        "resampling": RESAMPLINGS,
        "skips": SKIPS,
        "activation": tuple(ACTIVATIONS),
        "embedding_activations": tuple(ACTIVATIONS),
        "noise_embedding": ("logsnr", *BETAS),
        "text_norm": TEXT_NORMS,
        "dtype": DTYPES,
        "remat": tuple(REMAT),
        "attention_implementation": ("auto", "xla", "cudnn"),
    }
    for field, allowed in choices.items():
        value = getattr(network, field)
        if not set(value if isinstance(value, tuple) else (value,)) <= set(allowed):
            now = BEFORE_POLICIES.get(value) if field == "remat" else None
            hint = f", which is {now!r} now" if now else ""
            raise UserError(
                f"The network's {field} is {value!r}{hint}; choose from {', '.join(allowed)}."
            )
    if network.entry_skips and network.skips == "level":
        raise UserError(
            "The network's entry_skips is set but skips is 'level'; set entry_skips to False, "
            "or skips to 'block'."
        )
    if len(network.middle_attention) != 2:
        raise UserError(
            f"The network's middle_attention is {network.middle_attention}; give two truth values,"
            " over pixels and over text."
        )
    if network.patch < 1:
        raise UserError(f"The network's patch is {network.patch}; make it 1 or more.")
    if set(network.strides) - {1, 2}:
        raise UserError(f"The network's strides are {network.strides}; make each of them 1 or 2.")
    for i, mult in enumerate(network.channel_mults):
        width = network.channels * mult
        attends = network.self_attention[i] or network.text_attention[i]
        if network.middle and i == levels - 1:
            attends = attends or any(network.middle_attention)
        for field, used in (("norm_groups", True), ("head_channels", attends)):
            if used and width % getattr(network, field):
                raise UserError(
                    f"Level {i} of the network has {width} channels, not a multiple of its "
                    f"{field} {getattr(network, field)}; change either."
                )


def check_inputs(network, z_t, cond) -> None:
    """Raises a UserError where inputs don't fit the fields."""
    _, height, width, _ = z_t.shape
    if min(height, width) < 1 or height % network.divisor or width % network.divisor:
        raise UserError(
            f"A picture of {height}×{width} pixels doesn't fit the network, which needs height "
            f"and width to be multiples of {network.divisor}; choose such a size."
        )
    more = ("lowres", "aug_logsnr") if network.super_resolution else ()
    more += ("guidance_weight",) if network.embed_guidance else ()
    for key in ("text_emb", "text_mask", *more):
        if key not in cond:
            raise UserError(f"The condition {key!r} is missing; this network needs it.")
    states_width = cond["text_emb"].shape[-1]
    text_width = network.text_channels or states_width
    pooled_width = text_width if network.pool_projected else states_width
    if network.pool_heads and pooled_width % network.pool_heads:
        raise UserError(
            f"The text to pool is {pooled_width} wide, not a multiple of the network's "
            f"pool_heads {network.pool_heads}; change pool_heads."
        )
    if network.text_norm == "group" and text_width % TEXT_GROUPS:
        raise UserError(
            f"Text is {text_width} wide, not a multiple of the {TEXT_GROUPS} groups that "
            "text_norm 'group' has; change text_channels."
        )
