"""Meshes are made of the devices that are there, or refused with a sentence."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import UserError
from cascade.parallel.mesh import AXES, make_mesh


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (-1, 2, 2), (2, -1, 1)])
def test_sizes_multiply_to_the_devices(sizes):
    mesh = make_mesh(**dict(zip(AXES, sizes, strict=True)))
    assert mesh.size == jax.device_count() == 8
    for axis, size in zip(AXES, sizes, strict=True):
        assert size in (-1, mesh.shape[axis])


@given(st.lists(st.integers(-3, 9), min_size=3, max_size=3))
def test_any_sizes_give_a_mesh_of_all_devices_or_a_sentence(sizes):
    try:
        mesh = make_mesh(**dict(zip(AXES, sizes, strict=True)))
    except UserError as error:
        assert "mesh" in str(error) or "-1" in str(error)
    else:
        assert mesh.size == jax.device_count()
