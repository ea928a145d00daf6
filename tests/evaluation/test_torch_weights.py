"""PyTorch's files without PyTorch: what is in them, and that nothing in them runs."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import UserError
from cascade.evaluation.torch_weights import is_torch_file, read_state_dict

NUMBERS = np.arange(24, dtype=np.float32)


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value):
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def sizes(values):
    return b"(" + b"".join(map(whole, values)) + b"t"


EMPTY = b"ccollections\nOrderedDict\n)R"


def tensor(count=24, offset=0, shape=(4, 6), strides=(6, 1), key="0", kind=b"FloatStorage"):
    storage = text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu")
    storage = b"((" + storage + whole(count) + b"tQ"
    rest = whole(offset) + sizes(shape) + sizes(strides) + b"\x89" + EMPTY
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + rest + b"tR"


def state_dict(**tensors):
    held = b"".join(text(name) + told for name, told in tensors.items())
    return b"\x80\x02" + EMPTY + b"(" + held + b"u."


def zipped(program, compression=zipfile.ZIP_STORED, **storages):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in ({"0": NUMBERS.tobytes()} | storages).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/byteorder", b"little")
    return stream.getvalue()


def old(program, magic=0x1950A86A20F9469CFC6C, version=1001, little=b"\x88", **storages):
    """The format before PyTorch 1.6: pickles, one after another, and the storages."""
    start = [b"\x8a\x0a" + magic.to_bytes(10, "little"), whole(version)]
    start.append(b"}" + text("little_endian") + little + b"s")
    kept = {"0": NUMBERS.tobytes()} | storages
    counts = {key: len(data) // (4 if key == "0" else 8) for key, data in kept.items()}
    keys = b"\x80\x02](" + b"".join(map(text, kept)) + b"e."
    numbers = b"".join(struct.pack("<q", counts[key]) + data for key, data in kept.items())
    return b"".join(b"\x80\x02" + each + b"." for each in start) + program + keys + numbers


FORMATS = [zipped, old]


@pytest.fixture
def read(tmp_path):
    def go(content):
        (tmp_path / "x.pth").write_bytes(content)
        return read_state_dict(tmp_path / "x.pth")

    return go


@pytest.mark.parametrize("made", FORMATS)
def test_tensors_are_views_of_their_storages(made, read):
    found = read(
        made(
            state_dict(
                whole=tensor(),
                turned=tensor(shape=(6, 4), strides=(1, 6)),
                part=tensor(offset=7, shape=(2,), strides=(3,)),
                number=tensor(1, 0, (), (), "1", b"LongStorage"),
                none=tensor(shape=(0, 3), strides=(3, 1)),
            ),
            **{"1": np.int64(7).tobytes()},
        )
    )
    np.testing.assert_array_equal(found["whole"], NUMBERS.reshape(4, 6))
    np.testing.assert_array_equal(found["turned"], NUMBERS.reshape(4, 6).T)
    assert found["part"].tolist() == [7, 10] and found["number"] == 7
    assert found["none"].shape == (0, 3)


CALLS = b"cos\nsystem\n" + b"(" + text("touch ran") + b"tR."
HOSTILE = {
    "a call": (b"\x80\x02" + CALLS, "'os.system'"),
    "a call within": (state_dict(a=CALLS[:-1]), "'os.system'"),
    "eval": (b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR.", "'builtins.eval'"),
    "a known name called": (b"\x80\x02ctorch\nFloatStorage\n(J\1\0\0\0tR.", "isn't called so"),
    "by the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "INST"),
    "a new object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a list": (b"\x80\x02].", "no state dict"),
    "nothing": (b"\x80\x02}.", "no state dict"),
    "no tensor": (state_dict(a=whole(3)), "isn't a tensor"),
    "another storage": (state_dict(a=tensor(kind=b"QUInt8Storage")), "'torch.QUInt8Storage'"),
    "too large": (state_dict(a=tensor(shape=(2**40,), strides=(0,))), "beyond its storage"),
    "too far": (state_dict(a=tensor(offset=1)), "beyond its storage"),
    "steps too long": (state_dict(a=tensor(strides=(2**50, 1))), "beyond its storage"),
    "before": (state_dict(a=tensor(offset=-1)), "are no sizes"),
    "a storage told too long": (state_dict(a=tensor(2**40)), "as long as"),
    "a storage that isn't there": (state_dict(a=tensor(key="9")), "as long as"),
    "no mark": (b"\x80\x02t.", "damaged"),
    "no memo": (b"\x80\x02h\x01.", "damaged"),
    "no values": (b"\x80\x02\x87.", "aren't there"),
    "no end": (b"\x80\x02}", "damaged"),
    "no dict": (b"\x80\x02]J\1\0\0\0J\1\0\0\0s.", "can't be filled"),
    "a list as a key": (b"\x80\x02}]J\1\0\0\0s.", "key that is no text"),
    "no storage": (b"\x80\x02" + text("x") + b"Q.", "no storage"),
}


@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("program, wanted", HOSTILE.values(), ids=HOSTILE)
def test_what_no_state_dict_needs_is_refused(program, wanted, made, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The older format's numbers have no lengths but those that tensors say.
    with pytest.raises(UserError, match=wanted if made is zipped else f"{wanted}|damaged"):
        read(made(program))
    assert not Path("ran").exists()


def test_other_zips_are_refused(read):
    good = zipped(state_dict(a=tensor()))
    with pytest.raises(UserError, match="compressed"):
        read(zipped(state_dict(a=tensor()), zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="has no data"):
        read(good.replace(b"data.pkl", b"date.pkl"))
    with pytest.raises(UserError, match="damaged"):
        read(good.replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes()))
    for length in range(4, len(good) - 1, 97):
        with pytest.raises(UserError, match="damaged"):
            read(good[:length])


def encrypted(content):
    """Every entry of its directory says so."""
    flags = content.index(b"PK\1\2") + 8
    while flags > 7:
        content = content[:flags] + b"\1" + content[flags + 1 :]
        flags = content.find(b"PK\1\2", flags) + 8
    return content


def test_an_encrypted_zip_is_refused(read):
    with pytest.raises(UserError, match="encrypted"):
        read(encrypted(zipped(state_dict(a=tensor()))))


def test_other_pickles_are_refused(read):
    good = state_dict(a=tensor())
    for changes, wanted in (
        ({"magic": 0x1950A86A20F9469CFC6D}, "not torch.save's"),
        ({"version": 1002}, "not torch.save's"),
        ({"little": b"\x89"}, "big-endian"),
        ({"0": NUMBERS.tobytes()[:-4]}, "as long as"),
    ):
        with pytest.raises(UserError, match=wanted):
            read(old(good, **changes))
    whole_file = old(good)
    for length in range(4, len(whole_file), 17):
        with pytest.raises(UserError, match="can't be read as PyTorch weights"):
            read(whole_file[:length])


@pytest.mark.parametrize("made", FORMATS)
@pytest.mark.parametrize("pickle_alone", [True, False])
@given(data=st.data())
def test_whatever_is_in_the_file_a_sentence_is_said(made, pickle_alone, data, tmp_path_factory):
    """A few of its bytes are others: of the pickle, or of all that there is."""
    path = tmp_path_factory.getbasetemp() / "spoiled.pth"
    program = state_dict(a=tensor(), b=tensor(offset=7, shape=(2,), strides=(3,)))
    spoiled = bytearray(program if pickle_alone else made(program))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0 if pickle_alone else 4, len(spoiled) - 1))
        spoiled[at] = data.draw(st.integers(0, 255))
    path.write_bytes(made(bytes(spoiled)) if pickle_alone else bytes(spoiled))
    try:
        assert all(isinstance(v, np.ndarray) for v in read_state_dict(path).values())
    except UserError as error:
        assert "can't be read as PyTorch weights" in str(error)


@pytest.mark.parametrize("zipped_file", [True, False])
def test_pytorchs_own_files(zipped_file, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    tensors = network.state_dict()
    base = torch.randn(4, 6)
    tensors |= {"turned": base.T, "part": base[1:3, 2:], "half": base.half(), "tied": base}
    path = tmp_path / "x.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped_file)
    assert is_torch_file(path.read_bytes()[:4])
    found = read_state_dict(path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.numpy().dtype
        np.testing.assert_array_equal(found[name], value.numpy())
    content = path.read_bytes()
    for length in range(4, len(content) - 1, len(content) // 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="can't be read as PyTorch weights"):
            read_state_dict(path)
