"""Word lists and sentence patterns behind the demonstration's tasks.

Everything here was written for this project. The order of a category's items matters: the model
learns a list as a ring, so that an answer never names an item twice.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# every category has the same number of items
CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    category: _words(items)
    for category, items in (
        (
            "animals",
            "cat dog horse cow pig sheep goat lion tiger bear wolf fox deer rabbit mouse "
            "elephant monkey camel zebra otter",
        ),
        (
            "birds",
            "eagle hawk owl robin sparrow crow raven dove pigeon duck goose swan heron stork "
            "parrot pelican penguin finch falcon wren",
        ),
        (
            "fruits",
            "apple pear peach plum cherry grape lemon lime orange mango banana melon fig date "
            "kiwi papaya guava apricot quince lychee",
        ),
        (
            "vegetables",
            "carrot potato onion leek cabbage spinach lettuce celery turnip radish beet pea bean "
            "pumpkin squash kale broccoli garlic fennel parsnip",
        ),
        (
            "colours",
            "red blue green yellow purple pink brown black white grey silver gold crimson violet "
            "indigo teal beige maroon turquoise scarlet",
        ),
        (
            "tools",
            "hammer saw drill wrench chisel file plane axe shovel rake spade level clamp pliers "
            "screwdriver trowel mallet crowbar anvil vise",
        ),
        (
            "instruments",
            "piano violin guitar flute drum trumpet harp cello clarinet oboe tuba banjo organ lute "
            "viola bassoon trombone accordion fiddle cymbal",
        ),
        (
            "vehicles",
            "car bus train truck boat ship lorry bicycle tram ferry van canoe tractor scooter sled "
            "wagon raft yacht glider kayak",
        ),
        (
            "clothes",
            "shirt coat hat scarf glove sock shoe boot dress skirt jacket sweater vest belt cap "
            "tie robe apron blouse cloak",
        ),
        (
            "trees",
            "oak pine maple birch willow elm cedar ash beech spruce fir poplar palm cypress larch "
            "hazel walnut chestnut alder rowan",
        ),
        (
            "foods",
            "bread cheese butter rice pasta soup salad cake pie honey jam egg yoghurt noodle "
            "pancake biscuit stew waffle muffin porridge",
        ),
        (
            "jobs",
            "teacher doctor farmer baker nurse pilot sailor painter writer singer tailor carpenter "
            "plumber lawyer judge chef miner weaver dentist gardener",
        ),
        (
            "sports",
            "football tennis hockey rugby cricket golf boxing rowing sailing skiing swimming "
            "running cycling fencing archery judo karate polo climbing diving",
        ),
        (
            "rooms",
            "kitchen bedroom bathroom attic cellar hall library office nursery pantry study garage "
            "studio lounge porch balcony workshop laundry chapel gallery",
        ),
    )
}

COMMON_WORDS: Final[tuple[str, ...]] = _words(
    "river mountain valley forest desert island ocean lake beach cave meadow field hill cliff "
    "garden bridge tower castle village city market harbour station street road path tunnel "
    "window door roof wall floor ladder mirror lamp candle clock chair table bottle basket "
    "bucket blanket pillow curtain carpet button needle thread pocket ribbon jewel crown ring "
    "coin purse letter paper pencil book page story song poem picture puzzle riddle secret "
    "answer question reason moment minute hour morning evening night winter spring summer "
    "autumn thunder rain snow wind storm cloud shadow sunshine rainbow moon star planet comet "
    "rocket engine wheel motor magnet battery copper iron steel stone marble crystal diamond "
    "feather wool cotton leather silk velvet brother sister mother father cousin friend "
    "neighbour stranger captain soldier king queen prince wizard giant dragon pirate robot "
    "circle square triangle corner border number letterbox signal network packet server "
    "memory token worker cluster quick slow bright gentle brave clever silent golden hollow "
    "tiny huge narrow ancient modern simple strong jump climb whisper wander gather travel "
    "listen follow borrow measure wonder remember"
)

PHRASES: Final[tuple[str, ...]] = (
    "good morning",
    "good night",
    "thank you",
    "well done",
    "hello world",
    "red apple",
    "blue sky",
    "green grass",
    "happy birthday",
    "no problem",
    "once again",
    "fresh bread",
    "cold water",
    "big yellow bus",
    "one step forward",
    "never give up",
    "ready to go",
    "home sweet home",
    "keep it simple",
    "safe and sound",
)

ALL_WORDS: Final[tuple[str, ...]] = tuple(
    dict.fromkeys([item for items in CATEGORIES.values() for item in items] + list(COMMON_WORDS))
)

STORY_HEROES: Final[tuple[str, ...]] = (
    *CATEGORIES["animals"],
    *CATEGORIES["birds"][:8],
    "dragon",
    "robot",
    "wizard",
    "pirate",
    "king",
    "queen",
    "giant",
    "captain",
    "farmer",
    "baker",
    "sailor",
    "painter",
)

STORY_SLOTS: Final[dict[str, tuple[str, ...]]] = {
    "name": _words("Pip Milo Luna Toby Nora Finn Ruby Otis Hazel Bruno Ivy Leo"),
    "trait": _words("small brave gentle clever curious quiet cheerful patient"),
    "place": _words("river forest meadow harbour castle village lake garden"),
    "thing": _words("lantern key map bell compass ribbon kite drum"),
    "friend": _words("squirrel hedgehog badger turtle frog beaver mole hare"),
}

# The beats of a story, told in this order. Every beat has sentences of its own, so the last
# sentence alone shows how far the story has come: that is what keeps the count exact.
STORY_OPENING: Final[tuple[str, ...]] = (
    "Once upon a time, a {trait} {hero} named {name} lived by the {place}.",
    "Long ago, a {trait} {hero} called {name} had a home near the {place}.",
    "There was once a {trait} {hero} named {name} who loved the {place}.",
)

STORY_BEATS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "Every morning {name} woke up early and looked at the sky.",
        "Each day began with a long walk in the morning light.",
    ),
    (
        "One day {name} found an old {thing} under a stone.",
        "Then, one day, a shiny {thing} lay in the grass.",
    ),
    (
        "The {thing} was cold and heavy, and a strange sign was painted on it.",
        "Nobody knew who had lost the {thing} or how old it was.",
    ),
    (
        "{name} showed it to a wise {friend} who lived next door.",
        "So {name} went to ask the {friend} for advice.",
    ),
    (
        "The {friend} said that it came from the other side of the hills.",
        "The {friend} had seen such a thing only once before, far away.",
    ),
    (
        "They packed bread and cheese and set out together.",
        "Without waiting, the two friends started a long journey.",
    ),
    (
        "At noon they crossed a narrow bridge made of rope.",
        "Around noon a wide bridge led them over the water.",
    ),
    (
        "Soon dark clouds came and heavy rain began to fall.",
        "All at once a storm rolled in with loud thunder.",
    ),
    (
        "They hid in a dry cave until the sky was clear again.",
        "A hollow tree kept them warm while they waited.",
    ),
    (
        "In the evening {name} lit a fire and sang an old song.",
        "After supper the {friend} told a funny tale about the moon.",
    ),
    (
        "The next day they met a giant who blocked the road.",
        "On the second day a locked gate stopped them.",
    ),
    (
        "The {friend} was afraid, but {name} stayed calm.",
        "It looked hopeless, yet {name} did not give up.",
    ),
    (
        "{name} held up the {thing}, and the way was free.",
        "With the help of the {thing}, {name} found a clever trick.",
    ),
    (
        "Behind the hills they saw a valley full of flowers.",
        "At last a green valley opened before their eyes.",
    ),
    (
        "An old woman ran to meet them and wept with joy.",
        "A kind old man greeted them at his door.",
    ),
    (
        "The {thing} had been in that family for a hundred years.",
        "It turned out that the {thing} had been stolen long ago.",
    ),
    (
        "As a reward they were given a boat with white sails.",
        "To thank them, the people held a great feast.",
    ),
    (
        "On the way home {name} and the {friend} laughed a lot.",
        "The trip back was short, and the sun was shining.",
    ),
)

STORY_ENDING: Final[tuple[str, ...]] = (
    "And so {name} the {hero} lived happily ever after.",
    "From that day on, {name} was the happiest {hero} of all.",
    "That night {name} the {hero} fell asleep with a smile.",
)
