r"""Numbers as people and models write them, read as exact rationals.

A part of a number is never read as the number: of ``3:30``, ``1.5.2``, ``2 hours 30 minutes`` or ``2^x`` nothing is
read. Thousands may be set apart by commas (also the Indian way), apostrophes or single spaces. A lone ``.`` is a decimal
point (``1.080`` is 1.08); points separate thousands only where they can do nothing else (``1.080,50``, ``1.080.500``).
A comma is a decimal one only after such groups: ``1,5`` may be two numbers and is not read. ``1 180/360`` is mixed.

Every quantifier that may run far is possessive, so that reading takes time in proportion to the text.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

__all__ = ["CONTINUED", "NUMBER", "TOKEN", "normalize", "value_of"]

_LONGEST, _LARGEST_EXPONENT = 400, 999  # characters and powers of ten; Python refuses integers of 4,300 digits
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 10**3}
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


def _fraction(match: re.Match[str], over: str) -> str:
    """Set a fraction apart from the whole number before it."""
    return f" {over}" if match.start() and match.string[match.start() - 1].isdigit() else over


_REWRITES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]|\\[,;: ]", " "),
    (r"\\[!()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])|\^\{?\\circ\}?|°", ""),
    (r"\\([$%&])", r"\1"),
    (r"\{,\}", ","),
    ("[⁄∕]", "/"),
    (
        r"\\[dtc]?frac\s?(?:\{\s*+(-?[0-9.,]++)\s*+\}|([0-9]))\s?(?:\{\s*+([0-9.,]++)\s*+\}|([0-9]))",
        lambda match: _fraction(match, f"{match[1] or match[2]}/{match[3] or match[4]}"),
    ),
    (r"\\(?:text|math|mbox|emph)[a-z]*+\s?\{([^{}]*+)\}", r" \1"),
    (f"[{_VULGAR}]", lambda match: _fraction(match, unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"))),
    (r"\\(?:times|cdot)(?![A-Za-z])\s?", "×"),
    (r"\^\{([-+]?[0-9]++)\}", r"^\1"),
    (r"(?<=[0-9])[⁰¹²³⁴-⁹⁺⁻]++", lambda match: "^" + match[0].translate(_SUPERSCRIPTS)),
    (r"(?<=[0-9])\*\*(?=[-0-9])", "^"),
)

_DIGITS = r"""(?>[1-9][0-9]{0,2}(?:\ [0-9]{3}(?![0-9]))++(?:[.,][0-9]++)*+
    | [0-9]++(?:[.,'’][0-9]++)*+ | (?<!\w)\.[0-9]++(?:[.,'’][0-9]++)*+)"""
_READABLE = re.compile(
    r"""(?P<comma>[1-9][0-9]{0,2}(?:[.][0-9]{3}){2,}+ | [1-9][0-9]{0,2}(?:(?:\.[0-9]{3})++|(?:[ '’][0-9]{3})++),[0-9]++)
    | [0-9]++(?:\.[0-9]++)? | \.[0-9]++
    | (?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})++|(?:['’][0-9]{3})++|(?:\ [0-9]{3})++)
        | [1-9][0-9]?(?:,[0-9]{2}(?=,))++,[0-9]{3})(?:\.[0-9]++)?""",
    re.VERBOSE,
)
_OPAQUE = r"""(?:π|√\ ?[0-9]*+ | \\(?:pi|sqrt|[dtc]?frac|overline|bar|binom)(?![A-Za-z])
    (?:\ ?\[[^\[\]{}]{0,9}\])?(?:\ ?\{[^{}]*+\}){0,2}+)"""
# Two units, such as 2 hours 30 minutes; the second one may be left out.
_MAJOR = r"""(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|feet|foot|ft|yards?|miles?|pounds?|lbs?|dollars?
    |euros?|kilomet(?:er|re)s?|km|met(?:er|re)s?|m|kilograms?|kg|gallons?)\b"""
_MINOR = r"""(?:hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s|days?|weeks?|months?|inch(?:es)?|in|feet|ft|ounces?|oz|cents?
    |met(?:er|re)s?|centimet(?:er|re)s?|cm|grams?|g|quarts?)\b"""
_AMOUNT = r"[0-9]++(?:[.,][0-9]++)*+"
NUMBER = rf"""
(?P<minus>(?<![\w)\]}}%+-])(?<![0-9)\]}}%]\ )(?:[-–+]|−\ ?) | (?<=[=({{])\ ?-\ )?
(?:(?:(?:[A-Z]{{1,3}})?[$€£¥₹₽₩₱] | USD|EUR|GBP|INR|AUD|CAD|JPY|CNY|RMB|CHF|Rs\.?)\ ?(?P<sign>[-−])?)?
(?P<number>
    (?P<whole>(?>[1-9][0-9]{{0,2}}(?:\ [0-9]{{3}}(?=\ ))++ | [0-9]++(?:[,'’][0-9]++)*+))
        (?P<gap>\ |\ and\ |-)(?P<over>[1-9][0-9]*+)/(?P<under>[0-9]++)
  | (?P<digits>{_DIGITS})(?:\ ?/\ ?(?P<divisor>{_DIGITS}))?
)
(?: [eE](?P<exponent>[-−+]?[0-9]++) | \ ?[×x*·]\ ?10\^(?P<power>[-−+]?[0-9]++) | \^(?P<raised>[-−+]?[0-9]++)
  | (?P<scale>[kK](?!\w) | (?:\ ?(?i:hundred|thousand|million|billion|trillion)s?\b)++) )?
(?P<part>
    \ ?(?:\^|/[0-9]|:[0-9])[\w/:.]*+ | [^\W\d]*+\d\w*+ | (?:M|B|bn|mn|[xyzn])(?!\w) | [€£¥][0-9]++ | [\ .]?{_OPAQUE}
  | \ ?{_MAJOR}(?: (?:,|,?\ and)?\ ?{_AMOUNT}\ ?{_MINOR} | \ ?{_AMOUNT}(?!\ ?[\w%*/×÷=:^+-]) )
)?
(?P<dots>\.\.|…)?"""
"""Pattern of a number, verbose; `value_of` reads a match of it."""

TOKEN = re.compile(
    rf"{NUMBER} | (?P<opaque>{_OPAQUE}) | [_^]\{{?[-+]?[0-9]++ | [^\W\d_]\w*+(?:[_^]\{{?[-+]?[0-9]++)?", re.VERBOSE
)
"""Numbers, what no number can be read from, and words and exponents, whose digits are no numbers."""

CONTINUED = re.compile(r"[ ]?[-–−+*×÷/=<>:^][ ]?[$(]?[ ]?[0-9.]|,[ ]?[0-9]")
"""What makes a number the beginning of a range, a list or a calculation."""


def normalize(text: str) -> str:
    """Rewrite LaTeX and Unicode spellings of numbers in plain characters.

    Args:
        text: as it was written.

    Returns:
        The text that `NUMBER` and `TOKEN` match.
    """
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def value_of(match: re.Match[str]) -> Fraction | None:
    """Read a number.

    Args:
        match: of `NUMBER`.

    Returns:
        Its value, a percentage as the number before the sign; None where it has several readings or none.
    """
    spelled_wrong = match["part"] or (match["minus"] and match["sign"]) or (match["dots"] and "." in match["number"])
    if spelled_wrong or len(match[0]) > _LONGEST:
        return None
    value = _mixed(match) if match["whole"] else _ratio(match)
    if value is None:
        return None
    for word in re.findall(r"[a-z]+", (match["scale"] or "").lower()):
        value *= _SCALES[word.rstrip("s")]
    return -value if match["sign"] or (match["minus"] or "+") != "+" else value


def _mixed(match: re.Match[str]) -> Fraction | None:
    whole, over, under = _decimal(match["whole"]), int(match["over"]), int(match["under"])
    if whole is None or over >= under or match["gap"] == "-" or match["exponent"] or match["power"] or match["raised"]:
        return None
    return whole + Fraction(over, under)


def _ratio(match: re.Match[str]) -> Fraction | None:
    value, divisor = _decimal(match["digits"]), _decimal(match["divisor"] or "1")
    exponent = int((match["exponent"] or match["power"] or match["raised"] or "0").replace("−", "-"))
    if value is None or not divisor or abs(exponent) > _LARGEST_EXPONENT:
        return None
    if match["raised"]:
        value, exponent = Fraction(1), exponent if match["digits"] == "10" else None
    if exponent is None or (exponent and match["divisor"]):
        return None
    return value * Fraction(10) ** exponent / divisor


def _decimal(digits: str) -> Fraction | None:
    match = _READABLE.fullmatch(digits)
    if match is None:
        return None
    return Fraction(re.sub("[. '’]", "", digits).replace(",", ".") if match["comma"] else re.sub("[, '’]", "", digits))
