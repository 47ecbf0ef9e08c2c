"""Units and the words around a number: what of a normalised answer is its value, and what it is a value of.

Words that would change the value ("at least 5", "twice 5") are never taken away.
"""

import re
from typing import NamedTuple

# Spellings of each unit, its name first.
UNITS = tuple(
    tuple(line.split("|"))
    for line in (
        "dollar|dollars|usd|buck|bucks",
        "cent|cents",
        "euro|euros|eur",
        "pound sterling|pounds sterling|gbp",
        "yen|jpy",
        "rupee|rupees|inr|rs",
        "degree|degrees|deg",
        "radian|radians|rad",
        "mm|millimeter|millimeters|millimetre|millimetres",
        "cm|centimeter|centimeters|centimetre|centimetres",
        "dm|decimeter|decimeters|decimetre|decimetres",
        "m|meter|meters|metre|metres",
        "km|kilometer|kilometers|kilometre|kilometres",
        "inch|inches",
        "foot|feet|ft",
        "yard|yards|yd|yds",
        "mile|miles|mi",
        "mg|milligram|milligrams",
        "g|gram|grams|gm",
        "kg|kilogram|kilograms",
        "t|ton|tons|tonne|tonnes",
        "ounce|ounces|oz",
        "lb|lbs|pound|pounds",
        "ml|milliliter|milliliters|millilitre|millilitres",
        "l|liter|liters|litre|litres",
        "gallon|gallons|gal",
        "second|seconds|sec|secs|s",
        "minute|minutes|min|mins",
        "hour|hours|hr|hrs|h",
        "day|days",
        "week|weeks",
        "month|months",
        "year|years|yr|yrs",
        "km/hour|km/h|kmh|kmph|kph",
        "mile/hour|mph|mi/h",
        "m/second|m/s",
        "unit|units",
        "joule|joules|j",
        "watt|watts|w",
        "newton|newtons|n",
        "volt|volts|v",
        "hectare|hectares|ha",
        "acre|acres",
    )
)
UNIT_NAMES = {spelling: spellings[0] for spellings in UNITS for spelling in spellings}
# Single letters are variables; these are lengths, weights and times behind a number and a space ("5 m", not "5m").
LETTER_UNITS = "mgslh"
POWERS = {"square ": "2", "sq ": "2", "sq. ": "2", "cubic ": "3", "cu ": "3", "cu. ": "3"}
MONEY = "dollar|euro|pound sterling|yen|rupee"

# Words that make another value of the number beside them.
CHANGING_WORDS = re.compile(
    r"(?<![a-z])(?:not|no|non|never|neither|nor|except|without|least|most|more|less|fewer|greater|smaller|larger|than|"
    r"between|from|until|close|closer|near|nearly|almost|over|under|above|below|beyond|within|"
    r"up|plus|minus|negative|positive|times|multiplied|"
    r"divided|by|of|per|out|half|halves|thirds?|quarters?|twice|double|triple|thrice|dozens?|hundreds?|thousands?|"
    r"millions?|billions?|trillions?|squared|cubed|factorial|power|root|sqrt|mod|modulo|modulus|remainder|choose|"
    r"percent|percentage|base|if|when|unless|or|and|each|wrong|incorrect|false|maybe|either|any|all|every|other|another|"
    r"first|last|log|ln|exp|sin|cos|tan|square|cube|reciprocal|inverse|opposite|multiples?|infinity|infinite|cannot|"
    r"impossible|undefined|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|"
    r"fifty|sixty|seventy|eighty|ninety|[a-z]+n't)(?![a-z])"
)
# Those of them that change it from within the subject, too: "twice the sum is 5", but not "the number of ways is 5".
CHANGING_SUBJECTS = re.compile(
    r"(?<![a-z])(?:not|no|never|neither|nor|half|third|quarter|twice|double|triple|thrice|square|squared|cube|cubed|root|"
    r"reciprocal|inverse|opposite|minus|negative|log|ln|factorial|wrong|incorrect|false|maybe|if|when|unless|"
    r"[a-z]+n't)(?![a-z])"
)

AFTER_LATEX = re.compile(r"\s*\\text\s*\{\s*([^{}]+?)\s*\}\s*(?:\^\s*\{?\s*([23])\s*\}?)?$")
AFTER_PLAIN = re.compile(
    r"(?<=[\d})\s])\s*((?:(?:square|sq\.?|cubic|cu\.?) )?[A-Za-z]{2,}(?:/[a-z]+| per [a-z]+)?)"
    r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?$"
)
AFTER_LETTER = re.compile(rf"(?<=\d)\s+([{LETTER_UNITS}](?:/s)?)\s*(?:\^\s*\{{?\s*([23])\s*\}}?)?$")
RATE = re.compile(r"\s*(?:/\s*|\bper\s+)([a-z]{3,})$|\s*\\text\s*\{\s*(?:/\s*|per\s+)([a-z]{3,})\s*\}$")
BASE = re.compile(r"^([\dA-F]+)\s*_\s*\{?\s*\(?\s*(?:\\text\s*\{)?\s*(\w+?)\s*\}?\s*\)?\s*\}?$")
BASE_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
NUMBER = r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?"


class Quantity(NamedTuple):
    """A value as text, and the name of the unit it was given in; empty: none."""

    value: str
    unit: str


def split_unit(text: str) -> Quantity:
    """Value and unit of a normalised answer. What is no unit stays in the value."""
    rate = RATE.search(text)
    if rate and (per := UNIT_NAMES.get(rate[1] or rate[2])):  # 12 dollars per hour
        value, unit = split_unit(text[: rate.start()])
        return Quantity(value, f"{unit}/{per}")
    if money := re.match(rf"^(-?)\s*\\text\s*\{{({MONEY})\}}\s*(.+)$", text):
        return Quantity(money[1] + money[3], money[2])
    if text.endswith("\\%") and text != "\\%":
        return Quantity(text.removesuffix("\\%").rstrip(), "%")
    if number := BASE.match(text):
        return Quantity(number[1], f"base {BASE_WORDS.get(number[2], number[2])}")
    for pattern in (AFTER_LATEX, AFTER_PLAIN, AFTER_LETTER):
        found = pattern.search(text)
        value = text[: found.start()].strip() if found else ""
        if found is None or not value or value[-1] in "+-*/^_=<>(":
            continue
        name = unit_name(found[1], found[2]) or (thing_name(found[1]) if pattern is AFTER_LATEX else "")
        if name and not (name == "degree" and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value)):
            return Quantity(value, name)
    return Quantity(text, "")


def unit_name(written: str, power: str | None = None) -> str:
    """The name of a unit with its power: ``cm^2`` of "square centimeters"; empty if it is none of the table."""
    words = re.sub(r"\s+", " ", written.casefold().strip(" ."))
    for prefix, implied in POWERS.items():
        if words.startswith(prefix):
            words, power = words.removeprefix(prefix), implied
    name = UNIT_NAMES.get(words, "")
    return f"{name}^{power}" if name and power else name


def thing_name(written: str) -> str:
    """The name of what is counted: "apple" of "apples"; empty if the words change the value."""
    return written.casefold().strip(" .").removesuffix("s") if is_harmless(written) else ""


def lone_number(text: str) -> str:
    """The one number of a sentence ("There are 33 ways"); empty if the words may make another value of it."""
    numbers = re.findall(NUMBER, text)
    if len(numbers) != 1:
        return ""
    before, number, after = text.partition(numbers[0])
    stands_alone = not before[-1:].isalpha() and "-" not in before[-2:] and not re.match(r"[a-zA-Z(]", after)
    return number if stands_alone and is_harmless(f"{before} {after}") and is_prose(f"{before} {after}") else ""


def is_prose(text: str) -> bool:
    """Whether these are words rather than products of variables: ``2 xyz`` and ``3 ab`` are mathematics."""
    words = re.findall(r"[a-z]+", text.casefold())
    long_words = [word for word in words if len(word) > 2]
    variables = [word for word in long_words if list(word) == sorted(set(word)) and word not in UNIT_NAMES]
    letters = [word for word in words if len(word) == 1 and word != "a"]
    return len(variables) < len(long_words) and not letters


def is_harmless(words: str, changing: re.Pattern[str] = CHANGING_WORDS) -> bool:
    """Whether ``words`` are prose around an answer that change nothing of it."""
    return bool(re.fullmatch(r"[a-zA-Z\s,.:;'()-]*", words)) and not changing.search(words.casefold())
