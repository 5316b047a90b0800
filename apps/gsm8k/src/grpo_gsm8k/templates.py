"""The word problems' wording: questions, right procedures and the mistakes pupils make in them.

A template reads like the text it makes. ``{A}`` and ``{B}`` are two names, ``{item}`` and ``{other}`` two kinds of
things, other braces are numbers. A step holds one calculation in square brackets, over the question's numbers or the
results ``x`` and ``y`` of the first two steps: ``[a*b]`` becomes GSM8K's ``<<4*6=24>>24``. ``mistake`` is a procedure
that a hurried reader follows instead (stops a step early, adds what is to be taken away); problems never contain it,
the unreliable teacher of :mod:`grpo_gsm8k.warmstart` does.
"""

from __future__ import annotations

from dataclasses import dataclass

# fmt: off
NAMES = (
    "Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo",
    "Ivy", "Jack", "Kate", "Liam", "Mia", "Noah", "Olga", "Paul",
)
ITEMS = (
    "apples", "pears", "books", "pens", "cards", "coins", "shells", "stickers",
    "marbles", "stamps", "eggs", "cakes", "balls", "beads", "toys", "flowers",
)
# fmt: on

Range = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """One kind of word problem.

    Args:
        name: what the problem is about, unique.
        question: text with ``{A} {B} {item} {other}`` and the numbers' names in braces.
        numbers: each number's inclusive range, or a calculation such as ``"b*q"`` with numbers before it (so that a
            division comes out even).
        steps: worked steps, one to three, each with one bracketed calculation; the last result is the answer.
        mistake: steps of the common wrong procedure.
        hard: whether the unreliable teacher makes the mistake more often than not.
    """

    name: str
    question: str
    numbers: dict[str, Range | str]
    steps: tuple[str, ...]
    mistake: tuple[str, ...]
    hard: bool = True


TEMPLATES = (
    # One step.
    Template(
        "gift",
        "{A} has {a} {item}. {B} gives {A} {b} more. How many {item} does {A} have now?",
        {"a": (5, 20), "b": (2, 9)},
        ("{A} has [a+b] {item} now.",),
        ("{A} has [a-b] {item} now.",),
        hard=False,
    ),
    Template(
        "giving",
        "{A} has {a} {item} and gives {b} to {B}. How many {item} does {A} have left?",
        {"a": (8, 20), "b": (2, 9)},
        ("{A} has [a-b] {item} left.",),
        ("{A} has [a+b] {item} left.",),
        hard=False,
    ),
    Template(
        "boxes",
        "{A} has {a} boxes with {b} {item} in each box. How many {item} does {A} have in all?",
        {"a": (2, 9), "b": (2, 9)},
        ("{A} has [a*b] {item} in all.",),
        ("{A} has [a+b] {item} in all.",),
        hard=False,
    ),
    Template(
        "sharing",
        "{A} puts {a} {item} into {b} equal bags. How many {item} are in each bag?",
        {"b": (2, 9), "q": (2, 9), "a": "b*q"},
        ("Each bag has [a/b] {item}.",),
        ("Each bag has [a-b] {item}.",),
        hard=False,
    ),
    Template(
        "difference",
        "{A} has {a} {item} and {B} has {b} {item}. How many more {item} does {A} have than {B}?",
        {"a": (8, 20), "b": (2, 9)},
        ("{A} has [a-b] more {item}.",),
        ("{A} has [a+b] more {item}.",),
    ),
    # Two steps.
    Template(
        "eating",
        "{A} buys {a} boxes with {b} {item} each and uses {c}. How many {item} are left?",
        {"a": (2, 6), "b": (2, 6), "c": (2, 9)},
        ("{A} buys [a*b] {item}.", "There are [x-c] {item} left."),
        ("{A} buys [a+b] {item}.", "There are [x-c] {item} left."),
    ),
    Template(
        "twice",
        "{A} has {a} {item}. {B} has twice as many. How many {item} do they have together?",
        {"a": (2, 15)},
        ("{B} has [a*2] {item}.", "They have [a+x] {item} together."),
        ("They have [a*2] {item} together.",),
    ),
    Template(
        "half",
        "{A} sells {a} {item} in the morning and half as many in the evening. How many {item} does {A} sell in all?",
        {"q": (2, 12), "a": "q*2"},
        ("{A} sells [a/2] {item} in the evening.", "{A} sells [a+x] {item} in all."),
        ("{A} sells [a/2] {item} in all.",),
    ),
    Template(
        "more",
        "{A} has {a} {item}. {B} has {b} more than {A}. How many {item} do they have together?",
        {"a": (2, 12), "b": (2, 9)},
        ("{B} has [a+b] {item}.", "They have [a+x] {item} together."),
        ("They have [a+b] {item} together.",),
    ),
    Template(
        "fewer",
        "{A} has {a} {item}. {B} has {b} fewer than {A}. How many {item} do they have together?",
        {"a": (8, 20), "b": (2, 9)},
        ("{B} has [a-b] {item}.", "They have [a+x] {item} together."),
        ("They have [a+b] {item} together.",),
    ),
    Template(
        "wages",
        "{A} earns ${a} an hour and works {b} hours a day. How many dollars does {A} earn in {c} days?",
        {"a": (2, 5), "b": (2, 4), "c": (2, 4)},
        ("{A} earns $[a*b] a day.", "In {c} days {A} earns $[x*c]."),
        ("{A} earns $[a*c] in {c} days.",),
        hard=False,
    ),
    Template(
        "change",
        "{A} has ${a} and buys {b} {item} for ${c} each. How many dollars does {A} have left?",
        {"a": (20, 40), "b": (2, 4), "c": (2, 5)},
        ("{A} pays $[b*c].", "{A} has $[a-x] left."),
        ("{A} has $[a-c] left.",),
    ),
    Template(
        "pages",
        "{A} reads {a} pages on Monday, {b} pages on Tuesday and {c} pages on Friday. "
        "How many pages does {A} read in all?",
        {"a": (5, 15), "b": (2, 9), "c": (2, 9)},
        ("{A} reads [a+b] pages by Tuesday.", "{A} reads [x+c] pages in all."),
        ("{A} reads [a+b] pages in all.",),
        hard=False,
    ),
    Template(
        "bus",
        "{A} drives a bus with {a} people. At the stop {b} get off and {c} get on. "
        "How many people are on the bus now?",
        {"a": (10, 20), "b": (2, 9), "c": (2, 9)},
        ("After {b} get off there are [a-b] people.", "There are [x+c] people now."),
        ("After {b} get off there are [a-b] people.", "There are [x-c] people now."),
    ),
    Template(
        "packing",
        "{A} bakes {a} trays with {b} cakes each and packs them into {c} equal boxes. How many cakes are in each box?",
        {"c": (2, 5), "m": (1, 2), "a": "c*m", "b": (2, 6)},
        ("{A} bakes [a*b] cakes.", "Each box has [x/c] cakes."),
        ("{A} bakes [a+b] cakes.", "Each box has [x-c] cakes."),
        hard=False,
    ),
    Template(
        "picnic",
        "{A} has {a} {item} and {b} {other}. {A} shares them among {c} children. How many things does each child get?",
        {"c": (2, 5), "q": (3, 8), "s": "c*q", "a": (2, 9), "b": "s-a"},
        ("{A} has [a+b] things.", "Each child gets [x/c] things."),
        ("{A} has [a+b] things.", "Each child gets [x-c] things."),
    ),
    Template(
        "saving",
        "{A} saves ${a} a week for {b} weeks. A bike costs ${c}. How many more dollars does {A} need?",
        {"a": (2, 6), "b": (2, 6), "c": (20, 40)},
        ("{A} saves $[a*b].", "{A} needs $[c-x] more."),
        ("{A} needs $[c-a] more.",),
    ),
    Template(
        "losing",
        "{A} has {a} {item}, gives half of them to {B} and then loses {b}. How many {item} does {A} have left?",
        {"q": (4, 12), "a": "q*2", "b": (2, 9)},
        ("{A} keeps [a/2] {item}.", "{A} has [x-b] {item} left."),
        ("{A} has [a-b] {item} left.",),
    ),
    Template(
        "ages",
        "{A} is {a} years old. {B} is {b} years older than {A}. In {c} years, how old is {B}?",
        {"a": (5, 20), "b": (2, 9), "c": (2, 9)},
        ("{B} is [a+b] years old.", "In {c} years {B} is [x+c]."),
        ("In {c} years {B} is [a+c].",),
        hard=False,
    ),
    # Three steps.
    Template(
        "legs",
        "{A} has {a} hens and {b} cows. Hens have 2 legs and cows have 4 legs. How many legs are there in all?",
        {"a": (2, 9), "b": (2, 6)},
        ("Hens have [a*2] legs.", "Cows have [b*4] legs.", "There are [x+y] legs in all."),
        ("There are [a+b] animals.", "They have [x*2] legs in all."),
    ),
    Template(
        "shopping",
        "{A} buys {a} {item} for ${b} each and {c} {other} for ${d} each. How many dollars does {A} pay in all?",
        {"a": (2, 5), "b": (2, 5), "c": (2, 5), "d": (2, 5)},
        ("The {item} cost $[a*b].", "The {other} cost $[c*d].", "{A} pays $[x+y] in all."),
        ("The {item} cost $[a*b].", "The {other} cost $[c+d].", "{A} pays $[x+y] in all."),
    ),
    Template(
        "garden",
        "A garden has {a} rows with {b} flowers each. {A} picks {c} and plants {d} more. "
        "How many flowers are there now?",
        {"a": (2, 6), "b": (2, 6), "c": (2, 9), "d": (2, 9)},
        ("The garden has [a*b] flowers.", "Then there are [x-c] flowers.", "There are [y+d] flowers now."),
        ("The garden has [a*b] flowers.", "There are [x-c] flowers now."),
    ),
    Template(
        "running",
        "{A} runs {a} miles a day for {b} days and {c} miles a day for {d} days. How many miles does {A} run in all?",
        {"a": (2, 5), "b": (2, 5), "c": (2, 5), "d": (2, 5)},
        ("First {A} runs [a*b] miles.", "Then {A} runs [c*d] miles.", "{A} runs [x+y] miles in all."),
        ("First {A} runs [a+b] miles.", "Then {A} runs [c+d] miles.", "{A} runs [x+y] miles in all."),
        hard=False,
    ),
    Template(
        "leftover",
        "{A} has {a} bags with {b} {item} each, keeps {c} and gives the rest to {d} children. "
        "How many {item} does each child get?",
        {"a": (2, 6), "b": (3, 6), "d": (2, 4), "c": (2, 9)},
        ("{A} has [a*b] {item}.", "{A} gives [x-c] {item}.", "Each child gets [y/d] {item}."),
        ("{A} has [a*b] {item}.", "Each child gets [x/d] {item}."),
    ),
)
