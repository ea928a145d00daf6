"""Two processes, one mesh: a cache built together, and batches encoded from each one's own rows."""

from processes import free_port, run_processes
from tiny_t5 import write_folder

SCRIPT = """
import sys
from functools import partial
import jax, numpy as np
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)

from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh, put_batch, whole_on_host
from cascade.text import cache
from cascade.text.encoders import minilm, t5
from cascade.text.on_the_fly import Tokenized, encoded

cache.SEGMENT = 8
write = cache.segments.write
CAPTIONS = [f"caption {i} " + "word " * (i % 3) for i in range(16)] + [""]
FLOAT32 = 1e-5


def deepfloyd():
    return t5(max_length=8, weights=f"{folder}/t5", null="empty_prompt", keep_padding=True,
              lower_case=False, dtype="float32")

mesh = make_mesh(data=1, fsdp=2, tensor=2)
for make in (lambda: minilm(max_length=8, weights=""), deepfloyd):
    # On this process's first device, whatever the other does.
    with jax.default_device(jax.local_devices()[0]):
        emb, mask = make().encode(CAPTIONS)

    together = cache.EmbeddingCache(f"{folder}/cache", make(), "float16")
    assert together.ensure(CAPTIONS, mesh, progress=False).captions == 17
    found = together.lookup(CAPTIONS)
    np.testing.assert_allclose(found["text_emb"], emb, rtol=2**-11, atol=FLOAT32)
    np.testing.assert_array_equal(found["text_mask"], mask)

    encoder = make()
    encoder.place(mesh)
    mine = CAPTIONS[process * 8 : process * 8 + 8]
    texts = encoded(encoder, put_batch(Tokenized(encoder)(mine), mesh))
    np.testing.assert_allclose(whole_on_host(texts["text_emb"]), emb[:16], atol=FLOAT32)
    np.testing.assert_array_equal(whole_on_host(texts["text_mask"]), mask[:16])
    for ours, theirs in zip(encoder.null(), (emb[-1], mask[-1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=FLOAT32)

failing = cache.EmbeddingCache(f"{folder}/failing", make(), "float16")
if process == 0:
    def full(*_):
        raise OSError(28, "No space left on device")

    cache.segments.write = full
    together._remove_damaged = full
ensuring = partial(failing.ensure, CAPTIONS, mesh, progress=False)
for attempt in (ensuring, partial(together.verify, mesh, progress=False)):
    try:
        attempt()
        print("done")
    except (UserError, OSError) as error:
        print("failed:", error)
if process == 0:
    cache.segments.write = write

apart = cache.EmbeddingCache(f"{folder}/cache of {process}", make(), "float16")
try:
    apart.ensure(CAPTIONS, mesh, progress=False)
    print("found")
except UserError as error:
    print(error)
"""


def test_two_processes_embed_on_one_mesh(tmp_path):
    write_folder(tmp_path / "t5")
    port = free_port()
    commands = [["-c", SCRIPT, process, port, tmp_path] for process in range(2)]
    codes, said = run_processes(commands, devices=2)
    assert codes == [0, 0], said
    assert said[0].out.count("failed:") == 2 and said[0].out.count("No space left on device") == 2
    assert said[1].out.count("failed: Process 0 failed") == 2
    assert "found" in said[0].out
    assert "Process 1 doesn't find" in said[1].out and "all processes share" in said[1].out
