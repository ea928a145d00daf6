"""Networks, in Flax Linen: the only package that imports flax.

`NETWORKS` maps the `name` of a config's network section to the module whose fields are its keys.
"""

from cascade.networks.unet import UNet

NETWORKS = {"unet": UNet}

__all__ = ["NETWORKS", "UNet"]
