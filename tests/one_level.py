"""Overrides that leave one level of a smoke config's network: little to compile, all to train."""

ONE_LEVEL = {
    "stage.network.channel_mults": (1,),
    "stage.network.num_blocks": (1,),
    "stage.network.strides": (1,),
    "stage.network.self_attention": (False,),
    "stage.network.text_attention": (True,),
    "stage.network.middle": False,
}


def flags(**changes) -> list[str]:
    """Command-line overrides of ONE_LEVEL and `changes`, whose `__` stand for dots."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config.{key}={value}" for key, value in {**ONE_LEVEL, **dotted}.items()]
