"""Models by name: a folder, or what the Hugging Face hub has under an id."""

import re
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import UserError
from cascade.interop.folders import without_weights

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?")
HUB_TOP = ("config.json", "spiece.model", "model*.json", "model*.safetensors")
HUB_FILES = ("/*.json", "/*.safetensors", "/spiece.model")  # of a folder
HUB_VARIANTS = ["*.fp16*", "*non_ema*"]  # the same weights again
PIPELINE = ("unet", "scheduler", "image_noising_scheduler", "text_encoder", "tokenizer")


def resolve(source: str | Path, parts: Sequence[str] = PIPELINE) -> Path:
    """The folder that a source names, fetched if it is a hub id.

    Args:
      source: a folder, or an id on the Hugging Face hub: "google/flan-t5-xl", or "…@REVISION" of a
        tag, branch or commit. JSON, safetensors and SentencePiece files are fetched, into the
        hub's usual cache: no code and no pickles.
      parts: the folders of a repository to fetch, besides the model at its top.

    Raises:
      UserError: no such folder; or the hub can't be reached or lacks it, or has only pickles, or
        the extra that fetches isn't installed.
    """
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return folder
    if not (named := HUB_ID.fullmatch(str(source))):
        raise UserError(
            f"There is no folder {str(source)!r}; give a folder, or a hub id such as"
            " google/flan-t5-xl."
        )
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError as error:
        raise UserError(
            f"There is no folder {str(source)!r}, and fetching it from the hub needs"
            " huggingface_hub; run `pip install 'cascade-imagen[hub]'`, or give a folder."
        ) from error
    allow = [*HUB_TOP, *(part + file for part in parts for file in HUB_FILES)]
    what = {"repo_id": named["id"], "revision": named["revision"]}
    try:
        folder = Path(snapshot_download(**what, allow_patterns=allow, ignore_patterns=HUB_VARIANTS))
        if any(folder.rglob("*.safetensors")):
            return folder
        files = list_repo_files(**what)
    except Exception as error:  # HTTP, cache and file errors have no base of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"There is no folder {str(source)!r}, and it couldn't be fetched from the hub"
            f" ({reason.rstrip('.')}); check the name and the network, or give a folder."
        ) from error
    raise without_weights(str(source), files)
