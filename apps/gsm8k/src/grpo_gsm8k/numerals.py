r"""Numbers as people and models write them, read as exact rationals.

A part of a number is never read as the number: of ``3:30``, ``1.5.2``, ``2 hours 30 minutes`` or ``2^x`` nothing is
read. Thousands may be set apart by commas (in the Indian way too), apostrophes or single spaces. A lone ``.`` is a
decimal point (``1.080`` is 1.08): points separate thousands only in ``1.080,50`` and ``1.080.500``. A comma is decimal
only after such groups: ``1,5`` may be two numbers and is not read. ``1 180/360`` is a mixed number. Quantifiers that
may run far are possessive, so that reading takes time in proportion to the text.
"""

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

_LONGEST, _LARGEST_EXPONENT = 400, 999  # characters and powers of ten; Python refuses integers of 4,300 digits
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "k": 10**3}
_FRAC = r"\\[dtc]?frac\s?(?:\{\s*+(-?[0-9.,]++)\s*+\}|([0-9]))\s?(?:\{\s*+([0-9.,]++)\s*+\}|([0-9]))"
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
    (_FRAC, lambda match: _fraction(match, f"{match[1] or match[2]}/{match[3] or match[4]}")),
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
_UNIT = r"""(?:(?:hour|hr|minute|min|second|sec|day|week|month|year|yard|mile|pound|lb|ounce|dollar|euro|cent|gallon
    |quart|(?:kilo|centi)?met(?:er|re)|(?:kilo)?gram)s? | feet|foot|ft|inch(?:es)?|[hs]|[ck]?m|k?g|oz)\b"""
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
  | \ ?{_UNIT}(?: (?:,|,?\ and)?\ ?{_AMOUNT}\ ?(?:{_UNIT}|in\b) | \ ?{_AMOUNT}(?!\ ?[\w%*/×÷=:^+-]) )
)?
(?P<dots>\.\.|…)?"""
TOKEN = re.compile(
    rf"{NUMBER} | (?P<opaque>{_OPAQUE}) | [_^]\{{?[-+]?[0-9]++ | [^\W\d_]\w*+(?:[_^]\{{?[-+]?[0-9]++)?", re.VERBOSE
)
"""Numbers, what no number can be read from, and words and exponents, whose digits are no numbers."""
CONTINUED = re.compile(r"[ ]?[-–−+*×÷/=<>:^][ ]?[$(]?[ ]?[0-9.]|,[ ]?[0-9]")
"""What makes a number the beginning of a range, a list or a calculation."""


def normalize(text: str) -> str:
    """Rewrite LaTeX and Unicode spellings of numbers in the plain characters that `NUMBER` and `TOKEN` match."""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def value_of(match: re.Match[str]) -> Fraction | None:
    """Read a match of `NUMBER`, a percentage as the number before the sign; None where its value cannot be told."""
    ambiguous = match["part"] or match["gap"] == "-" or (match["dots"] and "." in match["number"])
    if ambiguous or (match["minus"] and match["sign"]) or len(match[0]) > _LONGEST:
        return None
    value = _decimal(match["whole"] or match["digits"])
    divisor = _decimal(match["under"] or match["divisor"] or "1")
    exponent = match["exponent"] or match["power"] or match["raised"]
    power = int(exponent.replace("−", "-")) if exponent else 0
    if value is None or not divisor or abs(power) > _LARGEST_EXPONENT:
        return None
    if exponent and (match["over"] or match["divisor"] or (match["raised"] and value != 10)):
        return None
    if match["over"]:
        if int(match["over"]) >= divisor:
            return None
        value += int(match["over"]) / divisor
    else:
        value = (1 if match["raised"] else value) * Fraction(10) ** power / divisor
    for word in re.findall(r"[a-z]+", (match["scale"] or "").lower()):
        value *= _SCALES[word.rstrip("s")]
    return -value if match["sign"] or (match["minus"] or "+") != "+" else value


def _decimal(digits: str) -> Fraction | None:
    if (match := _READABLE.fullmatch(digits)) is None:
        return None
    return Fraction(re.sub("[. '’]", "", digits).replace(",", ".") if match["comma"] else re.sub("[, '’]", "", digits))
