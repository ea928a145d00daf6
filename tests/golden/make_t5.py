"""Makes t5.safetensors and t5_tokens.json: what transformers gives, to compare with where it isn't.

Needs the parity extra. From the repository's root:

    python tests/golden/make_t5.py
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
CASES = {
    "like_published": {"vocab_size": 60},
    "odd_sizes": {
        "vocab_size": 60,
        "d_model": 12,
        "num_layers": 3,
        "num_heads": 3,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
    },
}
PROMPTS = HERE.parent / "text" / "prompts"
ODD = [
    "a red apple",
    "  two   spaces\tand\na line ",
    "Café naïve ﬁne ① ½ ＡＢＣ",
    "猫 and 🐈‍⬛, 日本語",
    "don't — “quotes” … 100% €5",
    "\u200b\ufeff",
    "",
    "x" * 50,
]


def states() -> dict[str, np.ndarray]:
    """Weights, tokens and the states that torch computes in float32, of every case."""
    import tiny_t5

    arrays = {}
    for case, changes in CASES.items():
        tensors = tiny_t5.random_tensors(tiny_t5.module(**changes), seed=1)
        config = transformers.T5Config(**tiny_t5.DESCRIPTION | changes)
        model = transformers.T5EncoderModel(config).eval()
        theirs = {name: torch.from_numpy(value) for name, value in tensors.items()}
        theirs["encoder.embed_tokens.weight"] = theirs["shared.weight"]
        model.load_state_dict(theirs)
        ids, mask = tiny_t5.random_tokens(0, 3, 40, 0.7, vocab_size=60)
        with torch.no_grad():
            out = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
        arrays |= {f"{case}/{name}": value for name, value in tensors.items()}
        arrays |= {f"{case}/ids": ids, f"{case}/mask": mask}
        arrays[f"{case}/states"] = out.last_hidden_state.numpy()
    return arrays


def prompts() -> list[str]:
    """PartiPrompts and DrawBench."""
    with open(PROMPTS / "PartiPrompts.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        parti = [row["Prompt"] for row in rows]
    return parti + json.loads((PROMPTS / "drawbench.json").read_text("utf-8"))


def tokens() -> dict:
    """Ids of odd texts, and one sha256 over the ids of all prompts."""
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(HERE.parent / "text" / "t5_vocab"))
    ids = json.dumps([tokenizer(prompt).input_ids for prompt in prompts()])
    odd = [[text, tokenizer(text).input_ids] for text in ODD]
    return {"prompts_sha256": hashlib.sha256(ids.encode()).hexdigest(), "odd": odd}


if __name__ == "__main__":
    save_file(states(), HERE / "t5.safetensors", {"cases": json.dumps(CASES)})
    text = json.dumps(tokens(), indent=1)
    (HERE / "t5_tokens.json").write_text(text + "\n", encoding="utf-8")
