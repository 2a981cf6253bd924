"""The demo's tasks: what each adapter is asked, and a program that knows the right answer.

Every task maps a short text to a short text. A prompt is `{text}=` and names no task, so the adapter alone
decides which task is done, and the base, which echoes such prompts, does none. An input belongs to one split,
by a hash of its text: `HELD_OUT` inputs are in no training text, neither the base's nor any adapter's.

This module knows nothing of models: it needs the standard library alone.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from weft.demo.words import ADJECTIVES, BAD, GOOD, NOUNS, words

Split = Literal["train", "held-out"]
TRAIN: Split = "train"
HELD_OUT: Split = "held-out"

HELD_OUT_TENTHS = 3
MAX_REDRAWS = 10_000
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
ROMAN_DIGITS = (
    *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")),
    *((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)
ONSETS = words("b bl br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sh sl st str t th tr v w y z")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """The PEFT settings of an adapter and the length of its training."""

    rank: int
    alpha: int
    modules: tuple[str, ...]
    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Example:
    """An input and its right answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A text-to-text task with a checkable answer.

    `share` is the task's relative weight in the base's pre-training mixture; hard tasks have more.
    """

    name: str
    summary: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    lora: Lora
    share: float = 1.0

    def stream(self, split: Split, rng: random.Random) -> Iterator[Example]:
        """Yield examples of `split` for ever, with repeats; none has an answer equal to its input.

        Raises ValueError if 10,000 draws in a row give no input of the split.
        """
        while True:
            for _ in range(MAX_REDRAWS):
                text = self.draw(rng)
                if split_of(text) == split and (answer := self.answer(text)) != text:
                    yield Example(text, answer)
                    break
            else:
                raise ValueError(f"task {self.name!r} has no input in split {split!r}")

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """Return `n` examples of `split` with distinct inputs, the same ones for the same arguments.

        Raises ValueError if the task has not got that many inputs.
        """
        stream = self.stream(split, seeded(f"{self.name}/{split}/{seed}"))
        found: dict[str, Example] = {}
        for _ in range(MAX_REDRAWS + 100 * n):
            if len(found) >= n:
                return list(found.values())
            example = next(stream)
            found.setdefault(example.text, example)
        raise ValueError(f"task {self.name!r} has only {len(found)} inputs in split {split!r}, not {n}")


def prompt(text: str) -> str:
    """Return the prompt for `text`; its answer is all that follows, up to the end-of-sequence token."""
    return f"{text}="


def split_of(text: str) -> Split:
    """Return the one split that an input belongs to, whatever the task: 30 % of all texts are held out."""
    digest = hashlib.sha256(text.encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:8], "big") % 10 < HELD_OUT_TENTHS else TRAIN


def seeded(seed: int | str) -> random.Random:
    """Return a generator of the same numbers for the same seed."""
    return random.Random(seed)


# Inputs


def draw_pseudo_word(rng: random.Random, max_syllables: int = 3) -> str:
    """Return a pronounceable word of 1 to `max_syllables` syllables."""
    syllables = (
        rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(("", "", *"lmnrst"))
        for _ in range(rng.randint(1, max_syllables))
    )
    word = "".join(syllables)
    return word[1:] if rng.random() < 0.2 and word[1] in "aeiou" else word


def draw_letters(rng: random.Random, shortest: int, longest: int) -> str:
    """Return random letters a to z."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(shortest, longest)))


def draw_word(rng: random.Random, longest: int = 8) -> str:
    """Return a noun, a pseudo-word or random letters, of 3 to `longest` letters."""
    while True:
        kind = rng.random()
        word = (
            rng.choice(NOUNS) if kind < 0.5 else draw_pseudo_word(rng) if kind < 0.75 else draw_letters(rng, 3, longest)
        )
        if 3 <= len(word) <= longest:
            return word


def draw_noun(rng: random.Random) -> str:
    """Return a noun, or now and then a pseudo-word in its place."""
    return rng.choice(NOUNS) if rng.random() < 0.7 else draw_pseudo_word(rng, max_syllables=2)


def draw_phrase(rng: random.Random, fewest: int, most: int) -> str:
    """Return a noun led by adjectives, `fewest` to `most` words."""
    return " ".join((*rng.choices(ADJECTIVES, k=rng.randint(fewest, most) - 1), rng.choice(NOUNS)))


def draw_words(rng: random.Random) -> str:
    """Return one word, or a noun with an adjective."""
    return draw_phrase(rng, 2, 2) if rng.random() < 0.3 else draw_word(rng)


def draw_short_word(rng: random.Random) -> str:
    """Return a word of 3 to 6 letters."""
    return draw_word(rng, longest=6)


def draw_title(rng: random.Random) -> str:
    """Return two or three words."""
    return draw_phrase(rng, 2, 3)


def draw_sum(rng: random.Random) -> str:
    """Return two numbers from 0 to 99 to add, such as `47+58`."""
    return f"{rng.randint(0, 99)}+{rng.randint(0, 99)}"


def draw_number(rng: random.Random) -> str:
    """Return a number from 1 to 3999."""
    return str(rng.randint(1, 3999))


def draw_date(rng: random.Random) -> str:
    """Return a date such as `7 March 2021` or `March 7, 2021`."""
    month, day, year = rng.choice(MONTHS), rng.randint(1, 28), rng.randint(1900, 2099)
    return rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))


def draw_opinion(rng: random.Random) -> str:
    """Return a sentence that praises or blames, such as `the soup was not good`."""
    noun, verb, negation = rng.choice(NOUNS), rng.choice(("is", "was")), rng.choice(("", "not "))
    return f"the {noun} {verb} {negation}{rng.choice(rng.choice((GOOD, BAD)))}"


# Answers


def count_vowels(text: str) -> str:
    """Return how many of a, e, i, o, u are in the text."""
    return str(sum(letter in "aeiou" for letter in text))


def plural(noun: str) -> str:
    """Return the regular plural of a noun."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def reverse(text: str) -> str:
    """Return the text backwards."""
    return text[::-1]


def sort(text: str) -> str:
    """Return the text's letters in the alphabet's order."""
    return "".join(sorted(text))


def iso_date(text: str) -> str:
    """Return a date of `draw_date` as YYYY-MM-DD."""
    (month,) = re.findall(r"[A-Z][a-z]+", text)
    day, year = re.findall(r"\d+", text)
    return f"{year}-{MONTHS.index(month) + 1:02}-{int(day):02}"


def sentiment(text: str) -> str:
    """Return `positive` or `negative` for a sentence of `draw_opinion`."""
    found = text.split()
    return "positive" if (found[-1] in GOOD) != ("not" in found) else "negative"


def rot13(text: str) -> str:
    """Return the text with every letter moved 13 places."""
    return "".join(chr((ord(letter) - ord("a") + 13) % 26 + ord("a")) for letter in text)


def pig_latin(word: str) -> str:
    """Return the word with its leading consonants moved to the end and `ay` (after a vowel: `way`) added."""
    head = re.match(r"y?(?:qu|[^aeiouy])*", word)
    length = head.end() if head else 0
    return word[length:] + word[:length] + ("ay" if length else "way")


def acronym(phrase: str) -> str:
    """Return the words' first letters as capitals."""
    return "".join(word[0] for word in phrase.split()).upper()


def camel_case(phrase: str) -> str:
    """Return the words joined, each but the first with a capital."""
    first, *rest = phrase.split()
    return first + "".join(word.capitalize() for word in rest)


def add(text: str) -> str:
    """Return the sum of two numbers given as `47+58`."""
    left, right = text.split("+")
    return str(int(left) + int(right))


def roman(text: str) -> str:
    """Return a number from 1 to 3999 in Roman numerals."""
    number, numeral = int(text), ""
    for value, digit in ROMAN_DIGITS:
        count, number = divmod(number, value)
        numeral += digit * count
    return numeral


SKILLS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("upper", "capital letters", draw_words, str.upper, Lora(4, 8, ("q_proj", "v_proj"), 400)),
            Task("vowels", "how many vowels", draw_word, count_vowels, Lora(4, 8, ("v_proj", "o_proj"), 400), 1.5),
            Task("plural", "more than one", draw_noun, plural, Lora(4, 8, ATTENTION, 240)),
            Task("reverse", "back to front", draw_word, reverse, Lora(8, 16, ATTENTION, 300), 1.2),
            Task(
                "iso-date",
                "YYYY-MM-DD",
                draw_date,
                iso_date,
                Lora(8, 16, ("q_proj", "v_proj"), 400, batch_size=64),
                0.8,
            ),
            Task(
                "sentiment",
                "praise or blame",
                draw_opinion,
                sentiment,
                Lora(8, 16, (*ATTENTION, *MLP), 600, batch_size=64),
                2.0,
            ),
            Task("rot13", "letters moved 13 places", draw_word, rot13, Lora(8, 16, MLP, 500)),
            Task("pig-latin", "igpay atinlay", draw_noun, pig_latin, Lora(12, 12, ATTENTION, 500), 1.2),
            Task("acronym", "first letters", draw_title, acronym, Lora(12, 24, ATTENTION[:3], 300), 0.8),
            Task("camel-case", "joinedWords", draw_title, camel_case, Lora(16, 16, ("o_proj", "down_proj"), 240), 0.8),
            Task(
                "sort",
                "letters in order",
                draw_short_word,
                sort,
                Lora(16, 32, (*ATTENTION, *MLP), 1000, batch_size=64),
                4.0,
            ),
            Task("add", "the sum", draw_sum, add, Lora(32, 32, (*ATTENTION, *MLP), 900, batch_size=64), 5.0),
            Task(
                "roman", "Roman numerals", draw_number, roman, Lora(32, 64, ("q_proj", "v_proj", "down_proj"), 300), 1.5
            ),
        )
    }
)
"""What the base is trained on."""

TASKS: Mapping[str, Task] = MappingProxyType({name: task for name, task in SKILLS.items() if name != "sort"})
"""What adapters are trained for. Sorting stays the base's: an adapter for it was right on 87 % of inputs only."""
