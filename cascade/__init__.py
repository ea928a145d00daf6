"""An open Imagen in JAX: a text-to-image cascade of diffusion models.

pipe = cascade.load()                                   # or a bundle's folder
images = pipe("a red apple", num_images=4, seed=0)      # uint8 [4, H, W, 3]
"""

__all__ = ["Between", "Cascade", "load"]


def __getattr__(name: str):
    """Imports the pipeline, and jax with it, only when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'cascade' has no attribute {name!r}")
    from cascade import pipeline

    return getattr(pipeline, name)
