"""`cascade embed`: what it writes is trained from, resumed after kill -9, and mended."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from one_level import flags
from safetensors.numpy import load_file

from cascade import config
from cascade.cli import main
from cascade.data.loader import make_source
from cascade.data.sources import captions_of
from cascade.embed import embed
from cascade.errors import UserError
from cascade.parallel.mesh import make_mesh
from cascade.text.bert import BertEncoder
from cascade.text.encoders import minilm
from cascade.training.train import caption_arrays

SMOKE = "configs/emoji/base64.py:smoke"
CAPTIONS = 9  # the synthetic source's eight, and the empty one
# Embeds two captions a segment, and kills itself with −9 before the third segment is written.
DIES = """
import os, signal, sys
from cascade import config
from cascade.embed import embed
from cascade.text import cache, segment

cache.SEGMENT, write, written = 2, segment.write, []

def deadly(path, *rest):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(path, *rest))

segment.write = deadly
embed(config.load(sys.argv[1], sys.argv[3:]), sys.argv[2])
"""


def smoke(**changes):
    return config.load(SMOKE, flags(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **changes))


def segments(folder):
    return sorted(folder.rglob("captions-*.safetensors"))


def test_training_from_it_needs_no_weights(tmp_path, monkeypatch):
    out = tmp_path / "cache of mine"
    done = embed(smoke(), str(out), dtype="int8", progress=False)
    assert (done.captions, done.added.captions) == (CAPTIONS, CAPTIONS)
    assert done.bytes == sum(path.stat().st_size for path in segments(out))
    assert 0 < done.added.error < 0.02
    assert f"--config.text_cache.folder='{out}' --config.text_cache.dtype=int8" in str(done)

    monkeypatch.setattr(BertEncoder, "_read_params", lambda _: pytest.fail("loads weights"))
    from_it = smoke(text_cache__folder=out, text_cache__dtype="int8")
    encoder, source = minilm(max_length=48, weights=""), make_source(from_it.data, train=True)
    texts, null = caption_arrays(from_it, encoder, make_mesh(**from_it.mesh), [source], False)
    assert all(found.any() for found in texts(list(captions_of(source))).values())
    np.testing.assert_array_equal(null[0], encoder.null()[0])
    np.testing.assert_array_equal(null[1], encoder.null()[1])


def test_a_killed_run_loses_one_segment(tmp_path):
    command = [sys.executable, "-c", DIES, SMOKE, str(tmp_path)]
    died = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": ""}, check=False, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL
    assert "Embedding captions" in died.stderr and "caption/s" in died.stderr
    assert len(segments(tmp_path)) == 2
    done = embed(smoke(), str(tmp_path), progress=False)
    assert (done.captions, done.added.captions) == (CAPTIONS, CAPTIONS - 4)
    again = embed(smoke(), str(tmp_path), progress=False)
    assert (again.captions, again.added.captions) == (CAPTIONS, 0)
    assert "nothing was missing" in str(again)


def test_a_flipped_bit_is_mended(tmp_path, caplog):
    embed(smoke(), str(tmp_path), progress=False)
    (segment,) = segments(tmp_path)
    whole, states = segment.read_bytes(), load_file(segment)["states"]
    segment.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert embed(smoke(), str(tmp_path), progress=False).added.captions == CAPTIONS
    assert f"{segment} is damaged" in caplog.text
    np.testing.assert_array_equal(load_file(segment)["states"], states)


def test_another_encoder_s_cache_is_refused(tmp_path):
    theirs = smoke(text__max_length=24, stage__text_length=24)
    embed(theirs, str(tmp_path / "theirs"), progress=False)
    embed(smoke(), str(tmp_path / "ours"), progress=False)
    (theirs,), (ours,) = segments(tmp_path / "theirs"), segments(tmp_path / "ours")
    theirs.rename(ours.parent / theirs.name)
    with pytest.raises(UserError, match=r"max_length 24 .*, not by minilm with max_length 48"):
        embed(smoke(), str(tmp_path / "ours"), progress=False)


def test_the_folder_is_the_configs_unless_another_is_given(tmp_path):
    settings = flags(text_cache__folder=tmp_path / "cache", text_cache__dtype="bfloat16")
    result = CliRunner().invoke(main, ["embed", "--config", SMOKE, *settings])
    assert result.exit_code == 0 and f"{CAPTIONS} captions" in result.output
    assert len(segments(tmp_path / "cache")) == 1


def test_no_folder_at_all():
    with pytest.raises(UserError, match="give --out DIR"):
        embed(smoke(text_cache__folder=""), None)
