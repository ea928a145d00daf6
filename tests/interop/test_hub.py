"""Where others' weights are fetched from: a folder as it is, or the hub, no more than is needed."""

import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cascade.errors import UserError
from cascade.interop.hub import resolve
from cascade.text.encoders import t5

T5 = [
    "README.md",
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model.bin",
    "spiece.model",
    "tf_model.h5",
    "modeling.py",
]
PIPELINE = [
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "watermarker/diffusion_pytorch_model.safetensors",
]


def test_a_folder_is_its_own_source(tmp_path, monkeypatch):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t5").mkdir()
    assert resolve("~/t5") == tmp_path / "t5"


@pytest.mark.parametrize(
    "source",
    ["", "t5", "/no/such/folder", "../x/y", "a/b/c", "a/../b", "a/b@", "a/b@@c", "@c", "a/b@../c"],
)
def test_what_is_neither_a_folder_nor_a_hub_id(source):
    with pytest.raises(UserError, match="give a folder, or a hub id"):
        resolve(source)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a repository of some files in place of the hub; gives what was asked for and fetched."""

    class Hub:
        asked, files = (), []

        def snapshot_download(self, repo_id, *, revision, allow_patterns, ignore_patterns):
            self.asked = repo_id, revision
            for name in self.files:
                allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
                if allowed and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                    (tmp_path / name).parent.mkdir(exist_ok=True)
                    (tmp_path / name).write_text("{}")
            return str(tmp_path)

        def list_repo_files(self, repo_id, *, revision):
            assert self.asked == (repo_id, revision)
            return self.files

        def fetched(self):
            files = (path for path in tmp_path.rglob("*") if path.is_file())
            return sorted(str(path.relative_to(tmp_path)) for path in files)

    module, hub = type(sys)("huggingface_hub"), Hub()
    module.snapshot_download, module.list_repo_files = hub.snapshot_download, hub.list_repo_files
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


@pytest.mark.parametrize("revision", [None, "v1.1", "refs/pr/7", "0123abc"])
def test_a_hub_id_is_fetched_at_its_revision_without_code_or_pickles(hub, tmp_path, revision):
    hub.files = T5
    assert resolve("google/flan-t5-xl" + (f"@{revision}" if revision else "")) == tmp_path
    assert hub.asked == ("google/flan-t5-xl", revision)
    wanted = (".json", ".safetensors", "spiece.model")
    assert hub.fetched() == sorted(name for name in T5 if name.endswith(wanted))


def test_of_a_pipeline_no_checker_no_watermarker_and_no_weights_twice(hub):
    hub.files = PIPELINE
    resolve("DeepFloyd/IF-I-M-v1.0")
    assert hub.fetched() == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_a_text_encoder_needs_no_unet(hub):
    hub.files = PIPELINE
    with pytest.raises(UserError, match="config"):  # "{}" isn't a T5's
        t5(
            weights="DeepFloyd/IF-I-M-v1.0", max_length=77, null="zeros", keep_padding=False,
            lower_case=False, dtype="float32",
        )  # fmt: skip
    parts = {Path(name).parent.name for name in hub.fetched()}
    assert parts == {"", "text_encoder", "tokenizer"}


def test_a_repository_of_pickles_is_said_to_be_one(hub):
    hub.files = ["config.json", "pytorch_model.bin", "spiece.model", "tf_model.h5"]
    with pytest.raises(UserError, match=r"only pickles \(pytorch_model\.bin\).*flan-t5"):
        resolve("google/t5-v1_1-xxl@main")
    hub.files = ["config.json", "README.md"]
    with pytest.raises(UserError, match="'google/bare' holds no weights"):
        resolve("google/bare")


def test_a_hub_out_of_reach_is_told_in_one_sentence(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host.")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fail)
    with pytest.raises(UserError, match=r"couldn't be fetched .*\(no route to host\); check"):
        resolve("google/flan-t5-xl")


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'cascade-imagen\[hub\]'"):
        resolve("google/flan-t5-xl")
