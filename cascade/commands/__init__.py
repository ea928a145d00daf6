"""The commands of `cascade.cli`, by theme; each module lists its own in COMMANDS."""

# `--config.train.steps=9` and its like are left for ml_collections to read.
CONFIG_COMMAND = {"ignore_unknown_options": True, "allow_extra_args": True}
