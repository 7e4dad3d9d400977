"""The words and sentences that fill the wordings, apart for training and held-out prompts."""

from __future__ import annotations

from typing import NamedTuple

from scripts.demo_data.kinds.base import Split


class Category(NamedTuple):
    """Things of one sort. Two categories of the same group may overlap, and are never set against another."""

    plural: str
    singular: str
    group: str
    items: tuple[str, ...]


class Topic(NamedTuple):
    """Something to write about: the word that must appear, three sentences, and words that describe it."""

    phrase: str
    mention: str
    sentences: tuple[str, str, str]
    adjectives: tuple[str, ...]


CATEGORIES: dict[Split, tuple[Category, ...]] = {
    "train": (
        Category("fruits", "a fruit", "plant", ("apple", "banana", "cherry", "grape", "lemon", "mango")),
        Category("vegetables", "a vegetable", "plant", ("carrot", "onion", "potato", "cabbage", "spinach")),
        Category("trees", "a tree", "plant", ("oak", "pine", "birch", "willow", "beech")),
        Category("animals", "an animal", "animal", ("dog", "horse", "cow", "rabbit", "lion", "wolf")),
        Category("insects", "an insect", "animal", ("ant", "bee", "beetle", "moth", "wasp")),
        Category("colors", "a color", "color", ("red", "blue", "green", "yellow", "purple", "brown")),
        Category("tools", "a tool", "tool", ("hammer", "saw", "drill", "wrench", "shovel", "rake")),
        Category("vehicles", "a vehicle", "vehicle", ("car", "bus", "truck", "train", "tram", "boat")),
        Category("countries", "a country", "place", ("France", "Spain", "Japan", "Brazil", "Egypt", "Canada")),
        Category("clothes", "a piece of clothing", "clothes", ("shirt", "coat", "sock", "hat", "scarf")),
        Category("metals", "a metal", "metal", ("iron", "copper", "silver", "zinc", "nickel")),
        Category("body parts", "a part of the body", "body", ("hand", "nose", "knee", "elbow", "ear")),
        Category("school subjects", "a school subject", "subject", ("history", "physics", "biology", "art")),
        Category("pieces of furniture", "a piece of furniture", "home", ("table", "chair", "sofa", "desk")),
    ),
    "heldout": (
        Category("birds", "a bird", "animal", ("eagle", "sparrow", "owl", "robin", "crow")),
        Category("fish", "a fish", "animal", ("salmon", "trout", "tuna", "cod", "herring")),
        Category("drinks", "a drink", "drink", ("tea", "milk", "juice", "coffee", "lemonade")),
        Category("sports", "a sport", "sport", ("tennis", "football", "hockey", "boxing", "golf")),
        Category("musical instruments", "an instrument", "music", ("piano", "violin", "flute", "drum")),
        Category("flowers", "a flower", "plant", ("rose", "tulip", "daisy", "lily", "violet")),
        Category("cities", "a city", "place", ("London", "Paris", "Madrid", "Tokyo", "Vienna")),
    ),
}

TOPICS: dict[Split, tuple[Topic, ...]] = {
    "train": (
        Topic(
            "the sea",
            "sea",
            (
                "The sea is deep and full of life.",
                "Ships cross the sea every day.",
                "Its water tastes of salt.",
            ),
            ("deep", "blue", "salty", "wide", "restless"),
        ),
        Topic(
            "a cat",
            "cat",
            (
                "A cat sleeps for most of the day.",
                "At night the cat hunts mice.",
                "It purrs when it is content.",
            ),
            ("soft", "quick", "proud", "sleepy", "curious"),
        ),
        Topic(
            "bread",
            "bread",
            (
                "Bread is made from flour and water.",
                "Fresh bread smells wonderful.",
                "Many people eat it every day.",
            ),
            ("warm", "fresh", "crusty", "simple", "tasty"),
        ),
        Topic(
            "winter",
            "winter",
            ("Winter is the coldest season.", "In winter the days are short.", "Lakes may freeze over."),
            ("cold", "white", "long", "dark", "quiet"),
        ),
        Topic(
            "the moon",
            "moon",
            (
                "The moon shines at night.",
                "The moon goes around the earth.",
                "It looks different every night.",
            ),
            ("round", "pale", "distant", "bright", "silent"),
        ),
        Topic(
            "a bicycle",
            "bicycle",
            ("A bicycle has two wheels.", "You can ride a bicycle to work.", "It needs no fuel."),
            ("light", "fast", "cheap", "useful", "clean"),
        ),
        Topic(
            "rain",
            "rain",
            ("Rain falls from dark clouds.", "Plants need rain to grow.", "Take an umbrella with you."),
            ("wet", "gray", "steady", "cool", "gentle"),
        ),
        Topic(
            "a school",
            "school",
            ("A school is a place to learn.", "Many children walk to school.", "Teachers work there."),
            ("busy", "loud", "large", "helpful", "public"),
        ),
        Topic(
            "soup",
            "soup",
            ("Soup keeps you warm in winter.", "You eat soup with a spoon.", "My mother makes the best one."),
            ("hot", "thick", "salty", "filling", "cheap"),
        ),
        Topic(
            "a garden",
            "garden",
            ("A garden needs water and sun.", "Vegetables grow in the garden.", "Birds like to visit it."),
            ("green", "sunny", "quiet", "small", "colorful"),
        ),
        Topic(
            "a train",
            "train",
            ("A train runs on rails.", "The train stops at every town.", "It carries many people."),
            ("long", "fast", "noisy", "modern", "crowded"),
        ),
        Topic(
            "a river",
            "river",
            ("A river flows to the sea.", "Fish live in the river.", "Boats travel along it."),
            ("long", "winding", "clear", "cold", "strong"),
        ),
        Topic(
            "a book",
            "book",
            ("A good book tells a story.", "I read a book every week.", "You can borrow one for free."),
            ("old", "thick", "funny", "famous", "useful"),
        ),
        Topic(
            "a clock",
            "clock",
            ("A clock shows the time.", "The clock on the wall is old.", "It ticks all day long."),
            ("round", "exact", "old", "loud", "wooden"),
        ),
        Topic(
            "the forest",
            "forest",
            ("The forest is full of tall trees.", "Deer hide in the forest.", "The air there is fresh."),
            ("dark", "green", "deep", "quiet", "wild"),
        ),
        Topic(
            "a kitchen",
            "kitchen",
            ("A kitchen is a room for cooking.", "Our kitchen has a big table.", "It often smells of food."),
            ("warm", "clean", "busy", "bright", "small"),
        ),
        Topic(
            "snow",
            "snow",
            ("Snow covers the hills in white.", "Children play in the snow.", "It melts in the sun."),
            ("white", "soft", "cold", "fresh", "silent"),
        ),
        Topic(
            "a dog",
            "dog",
            ("A dog is a loyal friend.", "Every dog needs a daily walk.", "It guards the house."),
            ("loyal", "playful", "brave", "hungry", "friendly"),
        ),
    ),
    "heldout": (
        Topic(
            "a bridge",
            "bridge",
            ("A bridge joins two banks.", "Cars drive over the bridge.", "Some bridges are very old."),
            ("high", "narrow", "sturdy", "gray", "famous"),
        ),
        Topic(
            "honey",
            "honey",
            ("Honey is made by bees.", "I like honey on toast.", "It never goes bad."),
            ("sweet", "golden", "sticky", "natural", "rich"),
        ),
        Topic(
            "the desert",
            "desert",
            ("The desert is hot and dry.", "Few plants grow in the desert.", "Nights there are cold."),
            ("dry", "hot", "empty", "sandy", "vast"),
        ),
        Topic(
            "a lamp",
            "lamp",
            (
                "A lamp gives light in the evening.",
                "The lamp stands on my desk.",
                "I switch it off at bedtime.",
            ),
            ("bright", "tall", "elegant", "yellow", "modern"),
        ),
        Topic(
            "the wind",
            "wind",
            ("The wind moves the leaves.", "A strong wind can break a tree.", "It also turns mills."),
            ("strong", "sudden", "icy", "invisible", "wild"),
        ),
        Topic(
            "a market",
            "market",
            (
                "A market sells fresh food.",
                "People meet at the market on Saturday.",
                "It opens early in the morning.",
            ),
            ("lively", "open", "crowded", "cheerful", "local"),
        ),
    ),
}

# Short sentences to be given back unchanged.
ECHO_SENTENCES: dict[Split, tuple[str, ...]] = {
    "train": (
        "The bus leaves at nine.",
        "We painted the fence green.",
        "My brother plays the guitar.",
        "Lunch is ready in the garden.",
        "The key is under the mat.",
        "Two birds sat on the roof.",
        "She forgot her umbrella again.",
        "Please close the window.",
        "The baker sold all his rolls.",
        "Our train was late today.",
    ),
    "heldout": (
        "The ferry stops at noon.",
        "He planted three pear trees.",
        "Grandma knits a red blanket.",
        "Nobody saw the fox.",
        "They moved the piano upstairs.",
    ),
}

# One word from each part, in order, makes a phrase to rewrite.
PHRASE_PARTS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (
        ("the", "my", "our"),
        ("small", "old", "happy", "tired", "brown"),
        ("dog", "farmer", "teacher", "horse", "child", "driver"),
        ("sleeps", "waits", "sings", "works", "runs"),
    ),
    "heldout": (
        ("your", "her", "this"),
        ("young", "hungry", "clever", "quiet"),
        ("doctor", "rabbit", "baker", "pilot"),
        ("laughs", "swims", "paints", "smiles"),
    ),
}

# A word and what counts as its opposite; the first one is the chosen answer. No word of a held-out pair
# stands in a training pair.
OPPOSITES: dict[Split, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "train": (
        ("hot", ("cold",)),
        ("big", ("small", "little")),
        ("early", ("late",)),
        ("fast", ("slow",)),
        ("full", ("empty",)),
        ("happy", ("sad", "unhappy")),
        ("hard", ("soft", "easy")),
        ("heavy", ("light",)),
        ("high", ("low",)),
        ("loud", ("quiet", "soft")),
        ("near", ("far",)),
        ("new", ("old",)),
        ("open", ("closed", "close", "shut")),
        ("rich", ("poor",)),
        ("right", ("wrong", "left")),
        ("strong", ("weak",)),
        ("thick", ("thin",)),
        ("up", ("down",)),
        ("wide", ("narrow",)),
        ("young", ("old",)),
        ("buy", ("sell",)),
        ("push", ("pull",)),
        ("win", ("lose",)),
        ("always", ("never",)),
        ("before", ("after",)),
        ("front", ("back", "rear")),
    ),
    "heldout": (
        ("clean", ("dirty", "unclean")),
        ("wet", ("dry",)),
        ("tall", ("short",)),
        ("dark", ("bright",)),
        ("alive", ("dead",)),
        ("cheap", ("expensive", "costly")),
        ("first", ("last",)),
        ("inside", ("outside",)),
    ),
}

# No two words of a split share their first letter, so one look at it decides the order.
SORT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("apple", "boat", "cloud", "door", "egg", "farm", "gold", "house", "lamp", "moon", "tree"),
    "heldout": ("arrow", "bell", "candle", "ladder", "mirror", "pencil", "stone", "window"),
}
