"""The config that docs/text.md shows is one."""

import re
from pathlib import Path

from cascade import config
from cascade.describe import describe

PAGE = Path(__file__).parents[2] / "docs" / "text.md"


def test_the_example_is_a_config_at_both_sizes(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    for size in ("", ":smoke"):
        loaded = config.load(f"{tmp_path}/mine.py{size}")
        assert (loaded.text.name, loaded.text.max_length) == ("t5", loaded.stage.text_length)
        assert "GFLOP" in describe({None: loaded})  # traced: the network takes such a text
