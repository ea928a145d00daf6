"""An open Imagen in JAX: a text-to-image cascade of diffusion models."""
