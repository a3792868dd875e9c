"""Short stories around multi-step arithmetic: the task of the built-in demo model.

The task was made to have what the decoding heads are about. In each story some tokens are *free*
(names, objects, phrasing: many right choices, drawn from long-tailed Zipf distributions as in
natural language) and some are *forced* (the digits of the intermediate results and of the answer).
A good decoder samples the first and does not gamble with the second, and the answer tells.

The text that the demo model was trained on has *slips*, as text from the web does: a share of the
results forgets a carry or is off by one, and the story goes on from the wrong number. The text that
heads are trained on, and every problem's ground truth, is correct. So the model gives wrong digits
a real probability that the heads can learn to cut away: the task was built so, and success on it
shows that the whole chain works, nothing about other models.

Everything is a pure function of ``(seed, split, index)``. The numbers of a problem decide its split
(a checksum of the prompt), so no two splits share a problem whatever the seeds are.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from string import Formatter

from autodeco.files import atomic_write_text

__all__ = [
    "SPLITS",
    "TOKEN_PATTERN",
    "Story",
    "check_answer",
    "last_number",
    "problems",
    "records",
    "story",
    "vocabulary",
    "write_problems",
    "write_records",
]

#: One token of the demo tokenizer: a word or a digit with the space before it, a mark, a newline.
TOKEN_PATTERN = r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"

#: Split name -> the checksums (modulo 16) of its prompts.
SPLITS = {
    "pretrain": frozenset(range(10)),
    "train": frozenset(range(10, 13)),
    "heldout": frozenset({13}),
    "evaluation": frozenset({14, 15}),
}

_ZIPF_EXPONENT = 1.1
_STEPS = 3
_LOWEST, _HIGHEST = 11, 299
_QUESTION = " How many are there in the end? Story:"

_WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "name": """Mia Tom Anna Leo Sara Max Nora Ben Ida Paul Emma Jack Lily Omar Rosa Sam Vera
            Hugo Clara Finn Alma Otto Zoe Karl Maya Ivan Ruth Felix Nina Oscar Greta Amir Elsa
            Boris Tara Louis Freya Hassan Wanda Pedro Yuki Stefan Dora Kofi Petra Ravi Selma
            Jonas Bella Igor Lotte Marco Hanna Viktor Celia Dmitri Esther Rufus Thea Conrad
            Magda Silas Ursula Edgar""",
        "job": """farmer baker teacher sailor doctor painter tailor miller hunter singer weaver
            fisher potter gardener carpenter blacksmith merchant shepherd librarian clockmaker
            beekeeper barber pilot judge nurse cobbler mason jeweller cook porter poet surgeon
            printer wizard diver locksmith tinker glazier saddler cartographer""",
        "object": """apples books coins shells stones plums buttons candles marbles pears stamps
            eggs feathers lanterns bottles beads keys cards pencils figs nuts cups ribbons
            spoons roses cherries peaches bells maps baskets loaves ropes hats letters nails
            lemons kites turnips pebbles whistles medals boxes thimbles dolls drums bulbs
            cheeses pumpkins needles scrolls anchors acorns trumpets masks kettles goblets
            puppets compasses quills tiles lenses rubies chestnuts melons""",
        "adjective": """small red worn blue big green bright heavy white round dark golden shiny
            plain smooth little black rare broken silver soft cold yellow dusty lovely strange
            sweet dry painted wooden tiny purple clean fresh curious rusty brown pale wet noble
            crooked thin splendid fragile speckled hollow polished bitter striped magic precious
            humble scented frozen velvet twisted gleaming modest borrowed crimson""",
        "container": """box basket bag drawer chest barrel cart sack jar bowl cupboard trunk
            bucket crate tin case tray wagon shed cellar pot suitcase cabinet cradle vase locker
            wheelbarrow hamper bin satchel casket trough""",
        "place": """market village river harbour forest school garden station castle bridge
            church valley island mill square farm beach tower city lake inn museum orchard
            mountain palace quarry library theatre meadow lighthouse bakery abbey canal hill
            fair vineyard fortress swamp workshop desert pier chapel monastery volcano""",
        "time": """morning evening day afternoon night Monday Sunday Friday winter summer
            Saturday spring autumn weekend Tuesday noon Thursday holiday Wednesday dawn dusk
            midnight""",
        "weather": """sunny cold rainy warm quiet windy grey foggy bright hot stormy mild snowy
            busy lazy chilly misty dreary glorious gloomy breezy humid frosty peaceful sleepy
            hazy thundery radiant""",
        "mood": """happy tired proud glad calm kind careful cheerful young quiet clever lonely
            patient famous nervous friendly merry poor grumpy loyal wise shy generous hungry
            brave stubborn gentle thoughtful jolly restless solemn dreamy""",
        "link": """Then Later Soon Next Afterwards Suddenly Meanwhile Luckily Today Again
            Finally Surprisingly Sadly Eventually Quietly Shortly Strangely Oddly Unexpectedly
            Somehow""",
        "gain": """brought found bought added gave sent carried collected delivered offered
            gathered received got fetched returned donated picked won earned discovered packed
            unpacked made inherited rescued imported""",
        "lose": """lost sold took broke dropped hid removed stole gave traded borrowed ate threw
            needed wasted burned spoiled kept buried lent misplaced crushed damaged claimed
            shipped confiscated""",
        "who": """friend brother sister neighbour uncle aunt cousin stranger mother father guest
            child boy girl king traveller queen grandfather soldier thief monk captain duchess
            wizard mayor giant pirate clown prince gnome""",
    }.items()
}

_OPENINGS = (
    "On a {weather} {time}, {name} the {job} had {n} {adjective} {object} in a {container}.",
    "{name} was a {mood} {job} and kept {n} {adjective} {object} near the {place}.",
    "One {weather} {time} {n} {adjective} {object} lay in a {container} at the {place}.",
    "There was a {mood} {job} who had {n} {object} in a {adjective} {container}.",
    "In a {adjective} {container} by the {place}, {name} counted {n} {object}.",
    "Nobody at the {place} knew why {name} the {job} owned {n} {adjective} {object}.",
    "When {name} came to the {place}, the {container} held {n} {adjective} {object}.",
    "Long ago a {job} called {name} left {n} {adjective} {object} at the {place}.",
)
_GAINS = (
    "{link} a {mood} {who} {gain} {k} from the {place}, so there were {r}.",
    "{link} {name} {gain} {k} more, which made {r}.",
    "{name} the {job} {gain} {k} {adjective} ones, and that made {r}.",
    "That {time} the {who} {gain} {k} more, and now there were {r}.",
    "{link}, at the {place}, {k} more were in a {container}, giving {r}.",
    "A {adjective} {container} with {k} came from {name}, for a total of {r}.",
    "The {who} of {name} {gain} {k} and then there were {r}.",
    "With {k} more from the {mood} {job} it came to {r}.",
)
_LOSSES = (
    "{link} a {mood} {who} {lose} {k} at the {place}, so {r} were left.",
    "{link} {name} {lose} {k}, which left {r}.",
    "{name} the {job} {lose} {k} {adjective} ones, and that left {r}.",
    "That {time} the {who} {lose} {k} of them, and now only {r} were left.",
    "{link}, near the {place}, {k} fell from a {container}, leaving {r}.",
    "A {adjective} {container} with {k} went to {name}, and {r} remained.",
    "The {who} of {name} {lose} {k} and then {r} remained.",
    "Without the {k} that the {mood} {job} {lose} it came to {r}.",
)
_ENDINGS = (
    "{name} was {mood}.",
    "The {who} felt {mood}.",
    "It was a {weather} {time}.",
    "Everyone at the {place} was {mood}.",
    "The {container} was {adjective}.",
    "What a {weather} {time} for a {job}.",
)
_ANSWER = " The answer is {r}."


@dataclass(frozen=True)
class Story:
    """One story: ``prompt`` fixes the numbers, ``completion`` tells them, ``answer`` is the truth.

    ``totals`` are the correct running totals, the start first and the answer last. With slips the
    completion may state others; ``slipped`` says whether it does.
    """

    prompt: str
    completion: str
    answer: str
    numbers: tuple[int, ...]
    totals: tuple[int, ...]
    slipped: bool


@cache
def _zipf(count: int) -> tuple[float, ...]:
    """Cumulative Zipf weights of ``count`` ranks, ending in 1."""
    weights = [rank**-_ZIPF_EXPONENT for rank in range(1, count + 1)]
    total = sum(weights)
    return tuple(itertools.accumulate(weight / total for weight in weights))


def _draw(random: Random, choices: Sequence[str]) -> str:
    """One of ``choices`` under Zipf's law in their order."""
    return choices[min(bisect(_zipf(len(choices)), random.random()), len(choices) - 1)]


def _between(random: Random, low: int, high: int) -> int:
    # random() alone is promised to be the same in every version of Python.
    return low + int(random.random() * (high - low + 1))


def _numbers(random: Random) -> tuple[int, ...]:
    """A start and signed steps whose running totals stay within the task's bounds."""
    total = _between(random, _LOWEST, 99)
    numbers = [total]
    for _ in range(_STEPS):
        size = _between(random, 11, 99)
        if total - size < _LOWEST or (total + size <= _HIGHEST and random.random() < 0.5):
            numbers.append(size)
        else:
            numbers.append(-size)
        total += numbers[-1]
    return tuple(numbers)


def _prompt(numbers: Sequence[int]) -> str:
    signed = (f" {'+' if n > 0 else '-'} {abs(n)}" for n in numbers[1:])
    return f"{numbers[0]}{''.join(signed)}.{_QUESTION}"


def _slip(random: Random, before: int, change: int) -> int:
    """What someone writes who forgets the carry (or the borrow), or else miscounts by one."""
    right = before + change
    if change > 0 and before % 10 + change % 10 > 9:
        return right - 10
    if change < 0 and before % 10 < -change % 10:
        return right + 10
    return right + (1 if random.random() < 0.5 else -1)


@cache
def _slots(template: str) -> tuple[str, ...]:
    names = (field for _, field, _, _ in Formatter().parse(template) if field)
    return tuple(name for name in names if name in _WORDS)


def _tell(random: Random, templates: Sequence[str], **numbers: int) -> str:
    template = _draw(random, templates)
    words = {slot: _draw(random, _WORDS[slot]) for slot in _slots(template)}
    return " " + template.format(**words, **numbers)


def story(seed: int, split: str, index: int, *, slips: float = 0.0) -> Story:
    """The story number ``index`` of a split.

    Args:
        seed: Chooses the stream of stories; the split holds for all seeds.
        split: A key of :data:`SPLITS`.
        index: Any integer >= 0.
        slips: Probability that a result is stated wrong (and the story goes on from it).

    Raises:
        KeyError: ``split`` is not one of :data:`SPLITS`.
    """
    allowed = SPLITS[split]
    random = Random(f"autodeco story {seed} {split} {index}")
    while True:
        numbers = _numbers(random)
        prompt = _prompt(numbers)
        if zlib.crc32(prompt.encode()) % 16 in allowed:
            break
    stated = numbers[0]
    text = [_tell(random, _OPENINGS, n=stated)]
    slipped = False
    for change in numbers[1:]:
        wrong = random.random() < slips
        slipped = slipped or wrong
        stated = _slip(random, stated, change) if wrong else stated + change
        templates = _GAINS if change > 0 else _LOSSES
        text.append(_tell(random, templates, k=abs(change), r=stated))
    text.append(_tell(random, _ENDINGS))
    text.append(_ANSWER.format(r=stated))
    totals = tuple(itertools.accumulate(numbers))
    return Story(prompt, "".join(text), str(totals[-1]), numbers, totals, slipped)


def records(
    seed: int, split: str, count: int, *, start: int = 0, slips: float = 0.0
) -> Iterator[dict[str, str]]:
    """``count`` records ``{"prompt", "completion"}`` from index ``start`` on."""
    for index in range(start, start + count):
        one = story(seed, split, index, slips=slips)
        yield {"prompt": one.prompt, "completion": one.completion}


def problems(
    seed: int, split: str = "evaluation", count: int = 256, *, start: int = 0
) -> Iterator[dict[str, str]]:
    """``count`` problems ``{"problem", "gt"}`` from index ``start`` on."""
    for index in range(start, start + count):
        one = story(seed, split, index)
        yield {"problem": one.prompt, "gt": one.answer}


def last_number(text: str) -> str | None:
    """The last whole number in ``text`` without leading zeros, or None."""
    found = re.findall(r"\d+", text)
    return str(int(found[-1])) if found else None


def check_answer(text: str, gt: str) -> bool:
    """Whether the last number in the answer ``text`` is ``gt``."""
    return last_number(text) == gt


def vocabulary() -> list[str]:
    """Every token (under :data:`TOKEN_PATTERN`) that a story can hold, sorted."""
    templates = (*_OPENINGS, *_GAINS, *_LOSSES, *_ENDINGS, _ANSWER, _QUESTION)
    fixed = (re.sub(r"\{\w+\}", "", f" {template}") for template in templates)
    words = (word for choices in _WORDS.values() for word in choices)
    tokens = {token for text in fixed for token in re.findall(TOKEN_PATTERN, text)}
    tokens.update(f" {word}" for word in words)
    tokens.update(f"{space}{mark}" for space in ("", " ") for mark in "0123456789+-.,:?!")
    tokens.update(" \n")
    return sorted(tokens)


def write_records(
    path: Path, seed: int, split: str, count: int, *, start: int = 0, slips: float = 0.0
) -> None:
    """Write :func:`records` as JSON lines, atomically."""
    _write(path, records(seed, split, count, start=start, slips=slips))


def write_problems(
    path: Path, seed: int, split: str = "evaluation", count: int = 256, *, start: int = 0
) -> None:
    """Write :func:`problems` as JSON lines, atomically."""
    _write(path, problems(seed, split, count, start=start))


def _write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
