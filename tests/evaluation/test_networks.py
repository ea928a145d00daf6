"""The networks that features come from, against forwards written apart from them."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cascade.errors import UserError
from cascade.evaluation import features
from cascade.networks import convolutions, efficientnet_lite, inception
from cascade.parallel.mesh import all_devices, make_mesh

RNG = np.random.default_rng(0)
PICTURES = np.stack(  # smooth enough to be something, sharp enough to show how they are resized
    [np.kron(RNG.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in "ab"]
)


@pytest.fixture(scope="module")
def efflite():
    """The extractor, and features [2, 1280] of `PICTURES`."""
    extractor = features.efficientnet_lite0(all_devices())
    return extractor, np.asarray(extractor(PICTURES))


def test_features_are_a_numpy_forwards(efflite):
    weights = {k: np.asarray(v, np.float64) for k, v in load_file(features.VENDORED).items()}
    by_hand = np.stack([numpy_lite0(weights, prepared(picture)) for picture in PICTURES])
    np.testing.assert_allclose(efflite[1], by_hand, rtol=0, atol=2e-4 * by_hand.max())
    assert by_hand.shape == (2, 1280) and by_hand.std(0).max() > 0.1


def test_features_of_any_number_are_those_of_each():
    """Of 19 pictures, which fill no batch."""

    def network(unit, x):
        return x.reshape(len(x), -1)

    extract = features.Extractor("pixels", network, lambda x: x / 255.0, {}, "1", all_devices())
    pictures = RNG.integers(0, 256, (19, 4, 4, 3)).astype(np.uint8)
    np.testing.assert_allclose(extract.all_of(pictures), pictures.reshape(19, -1) / 255, rtol=1e-6)


def prepared(picture):
    """By Pillow, a channel at a time, in its floating-point mode."""
    channels = [Image.fromarray(picture[..., i].astype(np.float32), mode="F") for i in range(3)]
    large = [channel.resize((224, 224), Image.Resampling.BICUBIC) for channel in channels]
    x = np.stack([np.clip(np.asarray(channel), 0, 255) for channel in large], -1) / 255
    return ((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)


def numpy_lite0(weights, x):
    """One picture [3, 224, 224]: the published table of layers, spelled out again."""

    def norm(x, name):
        mean, variance = (weights[f"{name}.running_{leaf}"] for leaf in ("mean", "var"))
        scale = weights[f"{name}.weight"] / np.sqrt(variance + 1e-3)
        return (x - mean[:, None, None]) * scale[:, None, None] + weights[f"{name}.bias"][
            :, None, None
        ]

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        k = kernel.shape[-1]
        out = -(-x.shape[1] // stride)
        spare = max((out - 1) * stride + k - x.shape[1], 0)
        x = np.pad(x, ((0, 0), (spare // 2, spare - spare // 2), (spare // 2, spare - spare // 2)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]
        if kernel.shape[1] == 1:
            return np.einsum("chwij,cij->chw", windows, kernel[:, 0], optimize=True)
        return np.tensordot(kernel, windows, axes=([1, 2, 3], [0, 3, 4]))

    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    residual = [0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0]
    for i, (stride, skip) in enumerate(zip(strides, residual, strict=True)):
        at, before = f"_blocks.{i}", x
        if i > 0:
            x = relu6(norm(conv(x, f"{at}._expand_conv"), f"{at}._bn0"))
        x = relu6(norm(conv(x, f"{at}._depthwise_conv", stride), f"{at}._bn1"))
        x = norm(conv(x, f"{at}._project_conv"), f"{at}._bn2")
        x = x + before if skip else x
    return relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((1, 2))


def test_a_mesh_changes_nothing(efflite):
    mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    split = features.efficientnet_lite0(mesh)(PICTURES)
    assert len(split.sharding.device_set) == 2
    np.testing.assert_allclose(split, efflite[1], atol=1e-5)


@pytest.mark.parametrize("side", [50, 640])
def test_antialiased_resize_is_pillows(side):
    picture = RNG.integers(0, 256, (side, side, 3), np.uint8)
    x = features.resize(picture[None].astype(np.float32) / 255, 299, "antialiased")[0]
    for i in range(3):
        channel = Image.fromarray(picture[..., i].astype(np.float32), mode="F")
        large = np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(x[..., i], np.clip(large, 0, 255) / 255, atol=2e-6)


def test_inceptions_average_leaves_padding_out():
    ones = inception.mean_around(np.ones((1, 4, 4, 1), np.float32))
    np.testing.assert_allclose(ones, 1.0)


def inception_tensors():
    """Random weights under the standard names, of a size that keeps activations about 1."""
    rng, tensors = np.random.default_rng(1), {}
    for conv, (norm, shape) in convolutions.wanted(inception.fid_inception, 299).items():
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        tensors[f"{conv}.weight"] = rng.normal(size=shape, scale=scale).astype(np.float32)
        for leaf, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 1.5),
        ):
            tensors[f"{norm}.{leaf}"] = rng.uniform(low, high, shape[0]).astype(np.float32)
    return tensors


@pytest.mark.parametrize("side", [50, 640])
def test_bilinear_resize_is_torchs(side):
    torch = pytest.importorskip("torch")
    x = RNG.uniform(size=(1, 3, side, side))  # in float32 it would round where pixels lie
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(299, 299), mode="bilinear", align_corners=False
    )
    ours = features.resize(x.transpose(0, 2, 3, 1).astype(np.float32), 299, "bilinear")
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_inception_is_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = inception_tensors()
    save_file(tensors, tmp_path / "inception.safetensors")
    extractor = features.fid_inception(tmp_path / "inception.safetensors", all_devices())
    ours = np.asarray(extractor(PICTURES[:1]))
    x = torch.from_numpy(PICTURES[:1].transpose(0, 3, 1, 2).astype(np.float32) / 255)
    x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bicubic", antialias=True)
    x = x.clamp(0, 1)
    with torch.no_grad():
        theirs = torch_inception(torch, tensors, 2 * x - 1).numpy()
    assert ours.shape == (1, 2048) and theirs.std() > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.max())


def torch_inception(torch, tensors, x):
    """The network in PyTorch, block by block as the paper's figures and FID's changes have it."""
    F = torch.nn.functional
    tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance, weight, bias = (
            tensors[f"{name}.bn.{leaf}"]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, eps=1e-3))

    def chain(x, *layers):
        return functools.reduce(lambda x, layer: conv(x, layer[0], **layer[1]), layers, x)

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    p1, row, column = {"padding": 1}, {"padding": (0, 3)}, {"padding": (3, 0)}
    x = chain(x, ("Conv2d_1a_3x3", {"stride": 2}), ("Conv2d_2a_3x3", {}), ("Conv2d_2b_3x3", p1))
    x = chain(F.max_pool2d(x, 3, 2), ("Conv2d_3b_1x1", {}), ("Conv2d_4a_3x3", {}))
    x = F.max_pool2d(x, 3, 2)
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                conv(x, f"{m}.branch1x1"),
                chain(x, (f"{m}.branch5x5_1", {}), (f"{m}.branch5x5_2", {"padding": 2})),
                chain(x, *((f"{m}.branch3x3dbl_{i}", p1 if i > 1 else {}) for i in (1, 2, 3))),
                conv(mean(x), f"{m}.branch_pool"),
            ],
            1,
        )
    m = "Mixed_6a"
    triple = ((f"{m}.branch3x3dbl_1", {}), (f"{m}.branch3x3dbl_2", p1))
    double = chain(x, *triple, (f"{m}.branch3x3dbl_3", {"stride": 2}))
    x = torch.cat([conv(x, f"{m}.branch3x3", stride=2), double, F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        once, twice = [{}, row, column], [{}, column, row, column, row]
        x = torch.cat(
            [
                conv(x, f"{m}.branch1x1"),
                chain(x, *((f"{m}.branch7x7_{i}", p) for i, p in enumerate(once, 1))),
                chain(x, *((f"{m}.branch7x7dbl_{i}", p) for i, p in enumerate(twice, 1))),
                conv(mean(x), f"{m}.branch_pool"),
            ],
            1,
        )
    m, half = "Mixed_7a", {"stride": 2}
    first = chain(x, (f"{m}.branch3x3_1", {}), (f"{m}.branch3x3_2", half))
    other = enumerate([{}, row, column, half], 1)
    other = chain(x, *((f"{m}.branch7x7x3_{i}", p) for i, p in other))
    x = torch.cat([first, other, F.max_pool2d(x, 3, 2)], 1)
    for m, pool in (("Mixed_7b", mean), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        once = conv(x, f"{m}.branch3x3_1")
        twice = chain(x, (f"{m}.branch3x3dbl_1", {}), (f"{m}.branch3x3dbl_2", p1))
        sides = (("a", (0, 1)), ("b", (1, 0)))
        x = torch.cat(
            [
                conv(x, f"{m}.branch1x1"),
                *(conv(once, f"{m}.branch3x3_2{s}", padding=p) for s, p in sides),
                *(conv(twice, f"{m}.branch3x3dbl_3{s}", padding=p) for s, p in sides),
                conv(pool(x), f"{m}.branch_pool"),
            ],
            1,
        )
    return x.mean((2, 3))


def refusal(path):
    with pytest.raises(UserError) as caught:
        features.fid_inception(path, all_devices())
    return str(caught.value)


def test_other_files_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    (tmp_path / "pickled.pth").write_bytes(b"\x80\x02}q\x00.")
    assert "nor as torch.save" in refusal(tmp_path / "pickled.pth")
    assert "no such tensor" in refusal(features.VENDORED)
    conv = {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 1, 1), np.float32)}
    save_file(conv, tmp_path / "small.safetensors")
    assert "(32, 3, 1, 1)" in refusal(tmp_path / "small.safetensors")
    whole = {
        **{f"Conv2d_1a_3x3.bn.{leaf}": np.ones(32, np.float32) for leaf in ("weight", "bias")},
        "Conv2d_1a_3x3.conv.weight": np.full((32, 3, 3, 3), np.nan, np.float32),
    }
    save_file(whole, tmp_path / "nan.safetensors")
    assert "NaN" in refusal(tmp_path / "nan.safetensors")


def test_parameters_of_the_networks_are_the_published_numbers():
    def count(network, side):
        shapes = [shape for _, shape in convolutions.wanted(network, side).values()]
        return sum(int(np.prod(shape)) + 2 * shape[0] for shape in shapes)

    # Tan and Le's table, and torchvision's Inception-v3, each less its classifier.
    assert count(efficientnet_lite.lite0, 224) == 4_652_008 - 1_281_000
    assert count(inception.fid_inception, 299) == 23_834_568 - 2_049_000
