"""The word problems' wording: questions, right procedures and the mistakes pupils make in them.

A template reads like the text it makes. ``{A}`` and ``{B}`` are two names, ``{item}`` and ``{other}`` two kinds of
things, other braces are numbers. A step holds one calculation in square brackets, over the question's numbers or the
results ``x`` and ``y`` of the first two steps: ``[a*b]`` becomes GSM8K's ``<<4*6=24>>24``. ``mistake`` is a procedure
that a hurried reader follows instead (stops a step early, adds what is to be taken away); problems never contain it,
the unreliable teacher of `lessons` does. Steps name neither people nor things: a model of a million parameters spends
most of its training on copying those, and little of it on the numbers.
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
        ("There are [a+b] now.",),
        ("There are [a-b] now.",),
        hard=False,
    ),
    Template(
        "giving",
        "{A} has {a} {item} and gives {b} to {B}. How many {item} does {A} have left?",
        {"a": (8, 20), "b": (2, 9)},
        ("There are [a-b] left.",),
        ("There are [a+b] left.",),
        hard=False,
    ),
    Template(
        "boxes",
        "{A} has {a} boxes with {b} {item} in each box. How many {item} does {A} have in all?",
        {"a": (2, 9), "b": (2, 9)},
        ("There are [a*b] in all.",),
        ("There are [a+b] in all.",),
        hard=False,
    ),
    Template(
        "sharing",
        "{A} puts {a} {item} into {b} equal bags. How many {item} are in each bag?",
        {"b": (2, 9), "q": (2, 9), "a": "b*q"},
        ("Each bag has [a/b].",),
        ("Each bag has [a-b].",),
        hard=False,
    ),
    Template(
        "difference",
        "{A} has {a} {item} and {B} has {b} {item}. How many more {item} does {A} have than {B}?",
        {"a": (8, 20), "b": (2, 9)},
        ("That is [a-b] more.",),
        ("That is [a+b] more.",),
    ),
    # Two steps.
    Template(
        "eating",
        "{A} buys {a} boxes with {b} {item} each and uses {c}. How many {item} are left?",
        {"a": (2, 6), "b": (2, 6), "c": (2, 9)},
        ("First there are [a*b].", "There are [x-c] left."),
        ("First there are [a+b].", "There are [x-c] left."),
    ),
    Template(
        "twice",
        "{A} has {a} {item}. {B} has twice as many. How many {item} do they have together?",
        {"a": (2, 15)},
        ("The other has [a*2].", "Together they have [a+x]."),
        ("Together they have [a*2].",),
    ),
    Template(
        "half",
        "{A} sells {a} {item} in the morning and half as many in the evening. How many {item} does {A} sell in all?",
        {"q": (2, 12), "a": "q*2"},
        ("The evening makes [a/2].", "In all it is [a+x]."),
        ("In all it is [a/2].",),
    ),
    Template(
        "more",
        "{A} has {a} {item}. {B} has {b} more than {A}. How many {item} do they have together?",
        {"a": (2, 12), "b": (2, 9)},
        ("The other has [a+b].", "Together they have [a+x]."),
        ("Together they have [a+b].",),
    ),
    Template(
        "fewer",
        "{A} has {a} {item}. {B} has {b} fewer than {A}. How many {item} do they have together?",
        {"a": (8, 20), "b": (2, 9)},
        ("The other has [a-b].", "Together they have [a+x]."),
        ("Together they have [a+b].",),
    ),
    Template(
        "wages",
        "{A} earns ${a} an hour and works {b} hours a day. How many dollars does {A} earn in {c} days?",
        {"a": (2, 5), "b": (2, 4), "c": (2, 4)},
        ("A day makes $[a*b].", "In all it is $[x*c]."),
        ("In all it is $[a*c].",),
        hard=False,
    ),
    Template(
        "change",
        "{A} has ${a} and buys {b} {item} for ${c} each. How many dollars does {A} have left?",
        {"a": (20, 40), "b": (2, 4), "c": (2, 5)},
        ("They cost $[b*c].", "There are $[a-x] left."),
        ("There are $[a-c] left.",),
    ),
    Template(
        "pages",
        "{A} reads {a} pages on Monday, {b} pages on Tuesday and {c} pages on Friday. "
        "How many pages does {A} read in all?",
        {"a": (5, 15), "b": (2, 9), "c": (2, 9)},
        ("By Tuesday it is [a+b].", "In all it is [x+c]."),
        ("In all it is [a+b].",),
        hard=False,
    ),
    Template(
        "bus",
        "{A} drives a bus with {a} people. At the stop {b} get off and {c} get on. How many people are on the bus now?",
        {"a": (10, 20), "b": (2, 9), "c": (2, 9)},
        ("First there are [a-b] left.", "There are [x+c] now."),
        ("First there are [a-b] left.", "There are [x-c] now."),
    ),
    Template(
        "packing",
        "{A} bakes {a} trays with {b} cakes each and packs them into {c} equal boxes. How many cakes are in each box?",
        {"c": (2, 5), "m": (1, 2), "a": "c*m", "b": (2, 6)},
        ("First there are [a*b].", "Each box has [x/c]."),
        ("First there are [a+b].", "Each box has [x-c]."),
        hard=False,
    ),
    Template(
        "picnic",
        "{A} has {a} {item} and {b} {other}. {A} shares them among {c} children. How many things does each child get?",
        {"c": (2, 5), "q": (3, 8), "s": "c*q", "a": (2, 9), "b": "s-a"},
        ("There are [a+b] things.", "Each child gets [x/c]."),
        ("There are [a+b] things.", "Each child gets [x-c]."),
    ),
    Template(
        "saving",
        "{A} saves ${a} a week for {b} weeks. A bike costs ${c}. How many more dollars does {A} need?",
        {"a": (2, 6), "b": (2, 6), "c": (20, 40)},
        ("That makes $[a*b].", "It takes $[c-x] more."),
        ("It takes $[c-a] more.",),
    ),
    Template(
        "losing",
        "{A} has {a} {item}, gives half of them to {B} and then loses {b}. How many {item} does {A} have left?",
        {"q": (4, 12), "a": "q*2", "b": (2, 9)},
        ("Half is [a/2].", "There are [x-b] left."),
        ("There are [a-b] left.",),
    ),
    Template(
        "ages",
        "{A} is {a} years old. {B} is {b} years older than {A}. In {c} years, how old is {B}?",
        {"a": (5, 20), "b": (2, 9), "c": (2, 9)},
        ("Now it is [a+b] years.", "Then it is [x+c] years."),
        ("Then it is [a+c] years.",),
        hard=False,
    ),
    # Three steps.
    Template(
        "legs",
        "{A} has {a} hens and {b} cows. Hens have 2 legs and cows have 4 legs. How many legs are there in all?",
        {"a": (2, 9), "b": (2, 6)},
        ("Hens have [a*2] legs.", "Cows have [b*4] legs.", "In all it is [x+y] legs."),
        ("There are [a+b] in all.", "In all it is [x*2] legs."),
    ),
    Template(
        "shopping",
        "{A} buys {a} {item} for ${b} each and {c} {other} for ${d} each. How many dollars does {A} pay in all?",
        {"a": (2, 5), "b": (2, 5), "c": (2, 5), "d": (2, 5)},
        ("The first cost $[a*b].", "The others cost $[c*d].", "In all it is $[x+y]."),
        ("The first cost $[a*b].", "The others cost $[c+d].", "In all it is $[x+y]."),
    ),
    Template(
        "garden",
        "A garden has {a} rows with {b} flowers each. {A} picks {c} and plants {d} more. "
        "How many flowers are there now?",
        {"a": (2, 6), "b": (2, 6), "c": (2, 9), "d": (2, 9)},
        ("First there are [a*b].", "Then there are [x-c].", "There are [y+d] now."),
        ("First there are [a*b].", "There are [x-c] now."),
    ),
    Template(
        "running",
        "{A} runs {a} miles a day for {b} days and {c} miles a day for {d} days. How many miles does {A} run in all?",
        {"a": (2, 5), "b": (2, 5), "c": (2, 5), "d": (2, 5)},
        ("First it is [a*b] miles.", "Then it is [c*d] miles.", "In all it is [x+y] miles."),
        ("First it is [a+b] miles.", "Then it is [c+d] miles.", "In all it is [x+y] miles."),
        hard=False,
    ),
    Template(
        "leftover",
        "{A} has {a} bags with {b} {item} each, keeps {c} and gives the rest to {d} children. "
        "How many {item} does each child get?",
        {"a": (2, 6), "b": (3, 6), "d": (2, 4), "c": (2, 9)},
        ("First there are [a*b].", "Then there are [x-c].", "Each child gets [y/d]."),
        ("First there are [a*b].", "Each child gets [x/d]."),
    ),
)
