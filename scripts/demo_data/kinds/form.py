"""Obey a form: how many, on how many lines, in which case."""

from __future__ import annotations

import random

from scripts.demo_data.kinds.base import Filled, Kind, Split
from scripts.demo_data.kinds.pools import CATEGORIES, ECHO_SENTENCES, PHRASE_PARTS, TOPICS

_NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}


def _counted(count: int, noun: str) -> str:
    return f"{_NUMBER_WORDS[count]} {noun}" + ("" if count == 1 else "s")


def _some_of_a_category(split: Split, rng: random.Random) -> tuple[dict[str, str], list[str]]:
    category = rng.choice(CATEGORIES[split])
    count = rng.randint(2, 4)
    slots = {"n": _NUMBER_WORDS[count], "category": category.plural}
    return slots, rng.sample(category.items, count)


def _fill_bullets(split: Split, rng: random.Random) -> Filled:
    slots, items = _some_of_a_category(split, rng)
    chosen = "\n".join(f"- {item}" for item in items)
    return Filled(slots, chosen, {"type": "bullets", "count": len(items)})


def _fill_semicolons(split: Split, rng: random.Random) -> Filled:
    slots, items = _some_of_a_category(split, rng)
    return Filled(slots, "; ".join(items), {"type": "separated", "by": ";", "count": len(items)})


def _fill_word_count(split: Split, rng: random.Random) -> Filled:
    topic = rng.choice(TOPICS[split])
    count = rng.randint(1, 4)
    words = rng.sample(topic.adjectives, count)
    slots = {"topic": topic.phrase, "n": _counted(count, "word")}
    return Filled(slots, " ".join(words), {"type": "word_count", "count": count})


def _fill_lowercase(split: Split, rng: random.Random) -> Filled:
    topic = rng.choice(TOPICS[split])
    chosen = rng.choice(topic.sentences[:2]).lower()  # the third one need not name the topic
    check = {"type": "lowercase", "mention": topic.mention}
    return Filled({"topic": topic.phrase}, chosen, check)


def _fill_sentences(split: Split, rng: random.Random) -> Filled:
    topic = rng.choice(TOPICS[split])
    count = rng.randint(1, 3)
    check = {"type": "sentences", "count": count, "mention": topic.mention}
    slots = {"topic": topic.phrase, "n": _counted(count, "short sentence")}
    return Filled(slots, " ".join(topic.sentences[:count]), check)


def _fill_repeat(split: Split, rng: random.Random) -> Filled:
    sentence = rng.choice(ECHO_SENTENCES[split])
    return Filled({"sentence": sentence}, sentence, {"type": "exact", "text": sentence.removesuffix(".")})


def _fill_uppercase(split: Split, rng: random.Random) -> Filled:
    phrase = " ".join(rng.choice(part) for part in PHRASE_PARTS[split])
    return Filled({"phrase": phrase}, phrase.upper(), {"type": "exact", "text": phrase.upper()})


BULLETS = Kind(
    name="bullets",
    train=(
        "List exactly {n} {category}, each on a line that starts with '- '. Only the names.",
        "Give me {n} {category} as a bullet list with '- '. Nothing else.",
        "Name {n} {category} as '- ' bullets. No introduction, no explanations.",
        "Only a list, please: {n} {category}, one per line, each after '- '.",
        "Write {n} {category} as bullets ('- name') and stop.",
    ),
    heldout=(
        "Make a dashed list ('- ') of {n} {category}, names alone.",
        "I need {n} {category} in bullets, without comments.",
        "Which {n} {category} do you know? Bullets only, one name in each.",
    ),
    fill=_fill_bullets,
)

SEMICOLONS = Kind(
    name="semicolons",
    train=(
        "Name {n} {category} on one line with semicolons between them. No commas.",
        "Give {n} {category} separated by '; ' and nothing else.",
        "Write {n} {category} in one line, split by semicolons only.",
        "List {n} {category} like this: a; b; c. No other text.",
        "Only {n} {category}, please, with a semicolon between names.",
    ),
    heldout=(
        "Put {n} {category} in a row, divided by semicolons.",
        "I need {n} {category}, semicolon-separated, without comments.",
        "Which {n} {category} do you know? Use ; instead of commas and add no words.",
    ),
    fill=_fill_semicolons,
)

WORD_COUNT = Kind(
    name="word_count",
    train=(
        "Describe {topic} in exactly {n}, with no punctuation.",
        "Give exactly {n} for {topic}. No commas, no sentence.",
        "What is {topic} like? Answer with {n}, nothing else.",
        "{topic} in {n}, separated by spaces:",
    ),
    heldout=(
        "Sum up {topic}. Your reply must have {n}.",
        "Think of {topic}. Which {n} come to mind? Only spaces between.",
        "You have just {n} to say how {topic} is.",
    ),
    fill=_fill_word_count,
)

LOWERCASE = Kind(
    name="lowercase",
    train=(
        "Write one short sentence about {topic} using only lowercase letters.",
        "One sentence about {topic}, please, all in lowercase.",
        "In lowercase only, say one thing about {topic}.",
        "Tell me about {topic} in a single sentence without capital letters.",
    ),
    heldout=(
        "Use no capitals: write a sentence on {topic}.",
        "Give me a sentence on {topic} in small letters only.",
        "Say something short on {topic}. Every letter must be lowercase, even the first.",
    ),
    fill=_fill_lowercase,
)

SENTENCES = Kind(
    name="sentences",
    train=(
        "Write exactly {n} about {topic}.",
        "Tell me about {topic} in {n}, no more and no less.",
        "{n} about {topic}, please.",
        "Describe {topic}. Use exactly {n}.",
    ),
    heldout=(
        "What is {topic}? Stop after {n}.",
        "Explain {topic} to a child with {n}.",
        "Say what you know of {topic}; {n} must do.",
    ),
    fill=_fill_sentences,
)

REPEAT = Kind(
    name="repeat",
    train=(
        "Repeat this sentence and add nothing: {sentence}",
        "Write the same sentence again, word for word, nothing else: {sentence}",
        "{sentence}\nCopy the line above exactly.",
        "Say exactly this and no more: {sentence}",
    ),
    heldout=(
        "Echo the following sentence. {sentence}",
        "Type these words unchanged, then stop. {sentence}",
        "{sentence} Return that to me as it is.",
    ),
    fill=_fill_repeat,
)

UPPERCASE = Kind(
    name="uppercase",
    train=(
        "Write this in capital letters, nothing else: {phrase}",
        "Change to uppercase: {phrase}",
        "Repeat in all caps and add nothing: {phrase}",
        '"{phrase}" - give me only the uppercase version.',
    ),
    heldout=(
        "Put these words in capitals: {phrase}",
        "{phrase} - the same in big letters, please.",
        "Make every letter a capital letter: {phrase}",
    ),
    fill=_fill_uppercase,
)
