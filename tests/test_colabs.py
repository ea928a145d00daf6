"""Every notebook in colabs/, from top to bottom, with tiny networks, as a person would run it."""

import json
import pathlib
import re
import sys

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from processes import QUICK
from tiny_cascade import stage_config, tiny_experiment, trained

from cascade.config import to_json
from cascade.pipeline import Cascade
from cascade.text.encoders import minilm

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))
# What a kernel must not take from whoever runs the tests: their devices, and their hub token.
ENVIRONMENT = {
    "XLA_FLAGS": QUICK,
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_TOKEN": "",
    "HUGGING_FACE_HUB_TOKEN": "",
    "HF_HOME": "no-such-folder",
}


@pytest.fixture
def execute(tmp_path, tmp_path_factory, monkeypatch):
    """Runs a notebook in a kernel of this interpreter, with some parameters changed."""
    home = tmp_path_factory.mktemp("jupyter")
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))  # no startup files of its user's
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "tests",
        "language": "python",
    }
    (home / "tests").mkdir()
    (home / "tests" / "kernel.json").write_text(json.dumps(kernel))
    found = KernelSpecManager(kernel_dirs=[str(home)], ensure_native_kernel=False)

    def run(name, **parameters):
        notebook = read(COLABS / name)
        index = [cell.id for cell in notebook.cells].index("parameters")
        assigned = re.findall(r"^(\w+)(?:, (\w+))? =", notebook.cells[index].source, re.MULTILINE)
        assert set(parameters) <= {name for names in assigned for name in names}
        changed = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(changed, id="changed"))
        manager = AsyncKernelManager(kernel_name="tests", kernel_spec_manager=found)
        place = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(notebook, km=manager, timeout=None, resources=place)
        client.execute(cleanup_kc=True)  # else kernels stay until the tests end
        shown = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
        assert str(tmp_path) not in "".join(map(said, shown.values()))  # fit to be committed
        return shown

    return run


def read(path):
    return nbformat.read(path, as_version=4)


def pictures(outputs):
    """How many pictures a cell showed."""
    return sum("image/png" in output.get("data", {}) for output in outputs)


def said(outputs):
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory):
    """Two stages with random weights, 8 → 16, that read the shipped text encoder."""
    section = {"name": "minilm", "max_length": 8, "weights": ""}
    text = {"text_width": 384, "text_length": 8}
    stages = [trained(stage_config(8, 0, **text)), trained(stage_config(16, 8, **text))]
    pipe = Cascade(stages, section, minilm(max_length=8, weights=""))
    return pipe.save(tmp_path_factory.mktemp("tiny") / "bundle")


def test_inference(execute, tiny_bundle, tmp_path):
    shown = execute("inference.ipynb", BUNDLE=str(tiny_bundle))
    assert "8×8: 3 steps" in said(shown["load"]) and "16×16" in said(shown["load"])
    for cell in ("draw", "grid", "stages", "negative", "guidance", "steps", "between", "upscale"):
        assert pictures(shown[cell]) == 1, cell
    assert (tmp_path / "pictures" / "mine.png").is_file()


def config_file(path, resolution, lowres):
    """Writes a config of a tiny stage, twice as large as the notebook makes it on a CPU."""
    config = tiny_experiment()
    config.stage = stage_config(resolution, lowres, text_width=384, text_length=8)
    config.text.max_length = 8
    config.train.batch_size = 4
    told = f"def get_config(arg=''):\n    return from_json({to_json(config)!r})\n"
    path.write_text(f"from cascade.config import from_json\n\n\n{told}", encoding="utf-8")
    return str(path)


def test_train_your_own_then_distill(execute, tmp_path):
    files = config_file(tmp_path / "base.py", 16, 0), config_file(tmp_path / "sr.py", 32, 16)
    shown = execute("train_your_own.ipynb", CONFIGS=files, STEPS=(2, 1))
    assert "12 pictures" in said(shown["pictures"])
    assert "text → 8: 2 steps" in said(shown["config"]) and "8 → 16:" in said(shown["config"])
    for cell in ("pictures", "base", "progress", "sr", "draw"):
        assert pictures(shown[cell]) == 1, cell
    assert (tmp_path / "cascade-mine" / "bundle" / "cascade.json").is_file()

    # The guided student alone: tests/training have those of half the steps.
    few = {"START_STEPS": 2, "END_STEPS": 2, "UPDATES": 2, "PROMPTS": ["a red apple"]}
    shown = execute("distill.ipynb", **few)
    for cell in ("distill", "compare"):
        assert pictures(shown[cell]) == 1, cell
    assert said(shown["compare"]).count("s a picture") == 3  # teacher twice, student once
    assert (tmp_path / "cascade-mine/few/students/guided/cascade.json").is_file()


def test_import_deepfloyd_does_nothing_without_a_token(execute, tmp_path):
    shown = execute("import_deepfloyd.ipynb")
    (sentence,) = [said(outputs).strip() for outputs in shown.values() if outputs]
    assert sentence.count(".") == 1 and "token" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_in_good_order(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert ids[:2] == ["title", "install-about"] and "parameters" in ids
    assert path.stat().st_size < 500_000
    # The same everywhere but for the extras: one address, and one line that installs.
    install = notebook.cells[ids.index("install")].source
    addresses = {
        re.search(r'REPOSITORY = "(.*?)"', read(other).cells[ids.index("install")].source)[1]
        for other in NOTEBOOKS
    }
    assert install.count("pip install") == 1 and len(addresses) == 1
    # The README's badges open notebooks that are there, at that address.
    opened = r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/colabs/([^)]+)"
    readme = (COLABS.parent / "README.md").read_text(encoding="utf-8")
    for repository, name in re.findall(opened, readme):
        assert addresses == {f"https://github.com/{repository}"} and (COLABS / name) in NOTEBOOKS
