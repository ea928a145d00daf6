"""A checkpoint that one process alone can't read: all go back to the one before."""

import pytest
from processes import cluster, run_processes

SCRIPT = """
import pathlib, sys
from cascade.parallel.processes import connect

connect()
import grain, jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from cascade.parallel.mesh import make_mesh
from cascade.training.checkpoint import Checkpoints
from cascade.training.state import with_shardings

folder, damage = sys.argv[1:]
rows = {"w": NamedSharding(make_mesh(data=1, fsdp=2, tensor=1), P("fsdp"))}
draw = lambda seed: {"w": jax.random.normal(jax.random.key(seed), (512, 64))}
state = jax.jit(draw, out_shardings=rows, static_argnums=0)
numbers = iter(grain.MapDataset.range(9).to_iter_dataset())
checkpoints = Checkpoints(folder, keep_last=2)
for step in (1, 2):
    checkpoints.save(step, state(step), numbers, {})
checkpoints.close()
if jax.process_index() == 0:
    for file in pathlib.Path(folder, "checkpoints", "2", "state", "ocdbt.process_1", "d").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink() if damage == "gone" else file.write_bytes(data)
multihost_utils.sync_global_devices("damaged")

checkpoints = Checkpoints(folder, keep_last=2)
step, found, _ = checkpoints.restore(with_shardings(jax.eval_shape(lambda: draw(0)), rows))
for ours, theirs in zip(found["w"].addressable_shards, state(1)["w"].addressable_shards):
    np.testing.assert_array_equal(ours.data, theirs.data)
print("went back to", step, "of", checkpoints.manager.all_steps())
checkpoints.save(2, found, numbers, {})
checkpoints.close()
print("saved", checkpoints.latest())
"""


@pytest.mark.parametrize(
    ("damage", "why"),
    [("gone", "process 1 can't read it"), ("a flipped bit", "its checksum doesn't match")],
)
def test_all_go_back_from_what_one_process_cant_read(tmp_path, damage, why):
    command = ["-c", SCRIPT, tmp_path, damage]
    codes, outputs = run_processes([command] * 2, environment=cluster(2))
    assert codes == [0, 0], outputs
    for output in outputs:
        assert output.out.splitlines() == ["went back to 1 of [1]", "saved 2"]
    assert f"Checkpoint 2 is damaged ({why}" in outputs[0].err
    assert (tmp_path / "checkpoints.broken" / "2").exists()
