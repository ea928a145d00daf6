"""Makes t5_unicode.json: ids of odd Unicode from transformers before 5, which calls sentencepiece.

Needs `pip install transformers==4.46.3 sentencepiece protobuf`, and no torch. From the
repository's root:

    python tests/golden/make_t5_unicode.py
"""

import json
import random
import sys
import unicodedata
from pathlib import Path

import transformers

HERE = Path(__file__).parent
TEXTS = 12  # of every general category
LETTERS = "aeZ 9"  # which the odd characters stand between
# What a later tokenizer in Rust reads differently, and what normalization has most to do with.
CHOSEN = [
    "\u01c6\u0610",
    "a\u0085b",
    "\ufdfa \ufb03 \u3392",
    "\uff76\uff9e \uff8a\uff9f",
    "\u1112\u1161\u11ab \ud55c",
    "e\u0301\u0323 \u1e69 q\u0307\u0323",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u202eabc\u202c \u2066x\u2069 a\u00adb",
    "\ue000 \U000f0000 \U0010ffff \ufffd \uffff",
    "\u0300 alone \u20dd",
    "\x00a\x1fb\x7fc",
    "\u2581 a\u2581b",
    "\u2028a\u2029b\u3000c\u00a0d",
]
# The special tokens' names: transformers reads the tokens, this package the text.
CONTROL = ["</s>", "<pad>", "<extra_id_0>", "a </s> b"]


def texts() -> list[str]:
    """The chosen ones, and characters of every category but surrogates between letters."""
    drawn = random.Random(0)
    categories = {}
    for code in range(sys.maxunicode + 1):
        categories.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    del categories["Cs"]
    mixed = []
    for name in sorted(categories):
        for _ in range(TEXTS):
            length = drawn.randint(1, 12)
            odd = drawn.choices(categories[name], k=length)
            mixed.append("".join(c if drawn.random() < 0.6 else drawn.choice(LETTERS) for c in odd))
    every = [character for name in sorted(categories) for character in categories[name][:300]]
    return CHOSEN + mixed + ["".join(drawn.choices(every, k=20)) for _ in range(10 * TEXTS)]


def main():
    """Writes the file, a text and its ids a line."""
    tokenizer = transformers.T5Tokenizer.from_pretrained(
        str(HERE.parent / "text" / "t5_vocab"), legacy=True
    )
    assert not tokenizer.is_fast
    parts = {
        name: [json.dumps([text, tokenizer(text).input_ids]) for text in group]
        for name, group in (("text", texts()), ("control", CONTROL))
    }
    lines = (f'"{name}": [\n' + ",\n".join(rows) + "\n]" for name, rows in parts.items())
    (HERE / "t5_unicode.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
