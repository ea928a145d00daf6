"""What `cascade data prepare` makes of a source; the argument says which kind of source.

    cascade data prepare --config configs/prepare.py:webdataset --out data/web
    cascade data prepare --config configs/prepare.py:emoji --out data/prepared \\
        --config.picture.side=64 --config.filter.min_side=64
"""

from ml_collections import ConfigDict

SOURCES = {
    "webdataset": {
        "name": "webdataset",
        "files": "data/tars/*.tar",
        "caption_file": "txt",
        "caption_key": "",
    },
    "parquet": {
        "name": "parquet",
        "files": "data/tables/*.parquet",
        "root": "data/pictures",
        "file_column": "file_name",
        "caption_column": "caption",
    },
    "emoji": {
        "name": "tfds",
        "dataset": "emoji/full",
        "data_dir": "data/emoji",
        "split": "train",
        "image_key": "image",
        "caption_key": "captions",
        "template": "{}",
    },
}


def get_config(arg: str = "webdataset") -> ConfigDict:
    """The preparation; `arg` names one of `SOURCES`."""
    if arg not in SOURCES:
        raise ValueError(f"Unknown argument {arg!r}; give {', '.join(SOURCES)}")
    config = ConfigDict()
    config.source = SOURCES[arg]
    config.filter = {
        "min_side": 256,
        "max_aspect": 3.0,
        "min_caption": 3,  # characters; a record needs one caption within the limits
        "max_caption": 1000,
        "duplicate_bits": 3,  # of 64 that may differ between duplicates; -1 keeps them all
    }
    if arg == "emoji":  # drawings that are meant to differ in little more than a smile
        config.filter.duplicate_bits = -1
    config.picture = {
        "side": 1024,  # the shorter one; what is smaller stays as it is
        "square": False,  # True: only the central square is kept
        "ground": "#ffffff",  # what shows through transparent pictures
        "encoding": "jpeg",  # or "png", or "raw", which is large and decodes at once
        "quality": 95,  # of "jpeg"
    }
    config.text = {"name": "minilm", "max_length": 48, "weights": ""}  # whose tokens are stored
    config.shard_records = 4096  # of the source, before the filter
    config.max_broken_rate = 0.01
    config.samples = 48  # pictures on the statistics page
    return config
