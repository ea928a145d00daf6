"""Captions of single drawings: a few phrasings of label, keywords and style."""

from cascade.data.emoji.drawings import Idea

STYLE_WORDS = {"twemoji": "flat twemoji style", "openmoji": "outlined openmoji style"}

_MASS = {
    "bacon", "bread", "broccoli", "butter", "candy", "clothing", "coral", "corn", "currency",
    "custard", "fire", "fog", "food", "garlic", "glass", "hair", "ice", "luggage", "mail", "meat",
    "money", "music", "people", "popcorn", "rice", "sake", "salt", "soap", "spaghetti", "sushi",
    "thread", "water", "wood", "yarn",
}  # fmt: skip
_JOINTS = (" of ", " with ", " on ", " in ", " behind ", " and ", " without ", " over ", " at ")


def with_article(label: str) -> str:
    """'red apple' -> 'a red apple'; plurals, mass nouns and proper names stay as they are."""
    head = label
    for joint in _JOINTS:
        head = head.split(joint)[0]
    noun = head.split(" ")[-1]
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is", "bus", "lens"))
    named = not label[0].islower() or ":" in label
    if plural or named or noun in _MASS:
        return label
    vowel = label[0] in "aeiou" and not label.startswith(("uni", "one", "ut"))
    return f"{'an' if vowel else 'a'} {label}"


def single_captions(idea: Idea, style: str, phrase: str) -> list[str]:
    """Distinct captions of one drawing, at most six, the plainest first."""
    words = [k for k in idea.keywords if k.lower() not in phrase.lower()][:3]
    texts = [
        phrase,
        f"an emoji of {phrase}",
        f"{phrase}, {STYLE_WORDS[style]}",
        f"a drawing of {phrase} in {STYLE_WORDS[style]}",
        idea.label,
        f"{phrase}: {', '.join(words)}" if words else phrase,
    ]
    return list(dict.fromkeys(texts))
