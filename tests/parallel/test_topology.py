"""Topologies by their rented names, and chips by jax's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import UserError
from cascade.parallel.topology import CHIPS, CORES, KINDS, SHAPES, Topology, parse

TOPOLOGIES = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda generation: st.builds(
        Topology,
        st.just(generation),
        st.sampled_from(list(SHAPES[generation].values())),
        st.integers(1, 9),
    )
)


@given(TOPOLOGIES)
def test_a_name_reads_back(topology):
    assert parse(topology.name) == topology
    assert parse(f" {topology.name.upper()} ") == topology


@given(TOPOLOGIES)
def test_slices_may_be_given_apart(topology):
    alone = topology._replace(slices=1)
    assert parse(alone.name, topology.slices) == topology


@pytest.mark.parametrize(
    ("name", "chips", "wiring"),
    [
        ("v5e-256", 256, "v5e:16x16"),
        ("v5p-512", 256, "v5p:4x8x8"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5litepod-8", 8, "v5e:2x4"),
        ("v4-8", 4, "v4:2x2x1"),
        ("2xv5p-256", 256, "v5p:4x4x8"),
    ],
)
def test_sizes_count_what_their_generation_counts(name, chips, wiring):
    topology = parse(name)
    assert (topology.chips, topology.wiring) == (chips, wiring)


@given(st.text(max_size=20))
def test_any_text_is_a_topology_or_a_sentence(text):
    try:
        assert parse(text).chips >= 1
    except UserError as error:
        assert "opology" in str(error) and "\n" not in str(error).replace(repr(text), "")


@pytest.mark.parametrize("name", ["v5p-9", "v7x-8", "v5e-512", "0xv5e-4", "v5p-0", "5e-4", "h100"])
def test_what_isnt_rented_is_refused(name):
    with pytest.raises(UserError, match="opology"):
        parse(name)


def test_slices_said_twice_are_refused():
    with pytest.raises(UserError, match="leave one out"):
        parse("2xv5e-4", 2)


def test_every_generation_has_its_figures():
    assert set(CHIPS) == set(SHAPES) == set(CORES)
    assert set(CHIPS.values()) <= set(KINDS.values())
