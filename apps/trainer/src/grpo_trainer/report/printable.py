"""Model text made safe to show: what a policy samples is arbitrary bytes, and terminals obey some of them."""

import unicodedata

__all__ = ["printable"]


def printable(text: str, *, newlines: bool = True) -> str:
    r"""Replace everything invisible that acts on a terminal or reorders a line by a visible escape.

    Args:
        text: anything, such as a sampled completion.
        newlines: keep newlines and tabs; otherwise they are escaped too.

    Returns:
        The text with control characters (ESC becomes \x1b), bidirectional overrides, other format characters and
        lone surrogates escaped.
    """
    kept = "\n\t" if newlines else ""
    return "".join(
        char if char in kept or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
