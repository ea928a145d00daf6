"""The same pictures, to within rounding, on any mesh of eight devices, weights split or whole."""

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_cascade import TEXT, WordEncoder, stage_config, tiny_stages, trained

import cascade
from cascade.cli import main
from cascade.images import read_image
from cascade.parallel import rules
from cascade.parallel.mesh import AXES, make_mesh
from cascade.pipeline import Cascade
from cascade.text.encoders import minilm

PROMPTS = ["a red apple", "two blue birds"]


@pytest.fixture(autouse=True, scope="module")
def quick_and_sharded():
    """Tiny networks: compiled without much ado, and sharded at all."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "SMALLEST_SHARDED", 256)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(*sizes):
    return make_mesh(**dict(zip(AXES, sizes, strict=True)))


def spread(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.fixture(scope="module")
def alone():
    """On one device: the cascade, and what it draws."""
    pipe = Cascade(tiny_stages(), TEXT, WordEncoder())
    assert pipe.mesh.size == 1
    return pipe, pipe(PROMPTS, 3, batch_size=8, return_stages=True, progress=False)


@pytest.fixture(scope="module")
def bundle(alone, tmp_path_factory):
    return alone[0].save(tmp_path_factory.mktemp("bundles") / "tiny")


class Placed(WordEncoder):
    """An encoder that remembers where it was put."""

    mesh = None

    def place(self, mesh):
        self.mesh = mesh


@pytest.mark.parametrize(
    "sizes",
    [
        (8, 1, 1),
        (2, 2, 2),
        pytest.param((2, 4, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_the_mesh_does_not_matter(alone, bundle, sizes):
    mesh, encoder = mesh_of(*sizes), Placed()
    pipe = cascade.load(bundle, encoder, mesh=mesh)
    split = [
        leaf
        for each in pipe._trained
        for leaf in jax.tree.leaves(each.params)
        if not leaf.sharding.is_fully_replicated
    ]
    assert bool(split) == (sizes[1] * sizes[2] > 1)
    assert all(leaf.addressable_shards[0].data.size < leaf.size for leaf in split)
    assert encoder.mesh == (mesh if split else None)

    drawn = pipe(PROMPTS, 3, return_stages=True, progress=False)
    for ours, theirs in zip(drawn, alone[1], strict=True):
        assert ours.shape == theirs.shape and spread(ours, theirs) <= 1
    one = pipe.upscale(alone[1][0][4], PROMPTS[1], first_index=4, progress=False)
    assert spread(one, alone[1][1][4:5]) <= 1


def test_a_batch_fills_the_devices_and_each_picture_is_kept_once(alone):
    pipe = Cascade(tiny_stages()[:1], TEXT, WordEncoder(), mesh_of(4, 2, 1))
    batches = list(pipe.draw_batches(PROMPTS, 5, batch_size=3, progress=False))
    assert [(batch.start, batch.count) for batch in batches] == [(0, 8), (8, 2)]
    assert all(len(batch.stages[0].sharding.device_set) == 8 for batch in batches)
    assert all(batch.stages[0].addressable_shards[0].data.shape[0] == 1 for batch in batches)
    numbers, pictures = zip(*(own for batch in batches for own in batch.own()), strict=True)
    assert numbers == tuple(range(10))
    whole = np.concatenate([stage for (stage,) in batches])
    np.testing.assert_array_equal(np.stack(pictures), whole)
    np.testing.assert_array_equal(np.stack(batches[1].first(9)), whole[8:])
    assert len(batches[0].first(2)) == 2 and len(batches[0].first(0)) == 0
    assert spread(whole[:3], alone[1][0][:3]) <= 1 and spread(whole[5:8], alone[1][0][3:]) > 1


def test_the_command_writes_the_same_files(tmp_path):
    stage = trained(stage_config(8, 0, text_width=384, text_length=8))
    section = {"name": "minilm", "max_length": 8, "weights": ""}
    Cascade([stage], section, minilm(**{k: section[k] for k in ("max_length", "weights")})).save(
        tmp_path / "b"
    )

    def sample(out, *more):
        arguments = ["sample", "--bundle", str(tmp_path / "b"), "--prompt", "moon", "--num", "3"]
        result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / out), *more])
        return result, {p.name: read_image(p) for p in (tmp_path / out).glob("*.png")}

    result, expected = sample("one")
    assert result.exit_code == 0, result.output
    result, found = sample("eight", "--mesh", "data=4,fsdp=2")
    assert result.exit_code == 0, result.output
    assert found.keys() == expected.keys() and len(found) == 4
    assert all(spread(found[name], expected[name]) <= 1 for name in found)

    for mesh, message in (
        ("data=3", "needs 3 devices but there are 8"),
        ("rows=8", "name axes once"),
        ("", "name axes once"),
    ):
        result, found = sample("none", "--mesh", mesh)
        assert result.exit_code == 2 and message in result.output and not found
