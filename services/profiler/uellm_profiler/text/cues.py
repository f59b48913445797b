"""Cues in a prompt of how long an answer is asked for: amounts, kinds of task, form."""

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Cues = npt.NDArray[np.float32]

_NUMBERS = {
    word: number
    for number, words in {
        1: "one single a an",
        2: "two couple pair",
        3: "three few",
        4: "four several",
        5: "five",
        6: "six",
        7: "seven",
        8: "eight",
        9: "nine",
        10: "ten",
        11: "eleven",
        12: "twelve dozen",
        13: "thirteen",
        14: "fourteen",
        15: "fifteen",
        16: "sixteen",
        17: "seventeen",
        18: "eighteen",
        19: "nineteen",
        20: "twenty",
        25: "twenty-five",
        30: "thirty",
        40: "forty",
        50: "fifty",
        100: "hundred",
        1000: "thousand",
    }.items()
    for word in words.split()
}
_NUMBER = r"(\d{1,5}|" + "|".join(sorted(_NUMBERS, key=len, reverse=True)) + ")"
_UNITS = {
    "words": "words? terms? tokens? characters? letters?",
    "sentences": "sentences? lines? bullets? points? statements? verses?",
    "paragraphs": "paragraphs? pages? stanzas? scenes? chapters? sections?",
    "times": "times? copies repetitions? rounds?",
}
_AMOUNTS = [
    re.compile(rf"\b{_NUMBER}[\s-]+(?:\w+[\s-]+)?(?:{units.replace(' ', '|')})\b")
    for units in _UNITS.values()
]
_RANGE = re.compile(
    r"\b(\d{1,6})\s*(?:(?:up |down )?to|and|through|until|till|-|\u2013|\.\.\.?)\s*(\d{1,6})\b"
)
_QUOTED = re.compile(r"(?<!\w)(?:'([^'\n]+)'|\"([^\"\n]+)\"|“([^”\n]+)”|`([^`\n]+)`)(?!\w)")
_ITEMS = re.compile(rf"\b{_NUMBER}\s+(?:\w+\s+){{0,2}}?\w{{3,}}s\b")

_KINDS = {
    "yes_no": "true_or_false yes_or_no whether is_it_true is_it_correct",
    "classify": "classif* categoriz* categoris* label identify_the identify_if detect sentiment",
    "choose": "choose select pick which_of which_one odd_one",
    "edit": "edit correct fix grammar* punctuat* proofread* spelling*",
    "rewrite": "rewrite* rephrase* re-phrase* paraphras* replace* change_the reword* convert "
    "transform* rearrange* reorder* reformat* format*",
    "translate": "translat* in_french in_spanish in_german in_italian in_chinese in_japanese "
    "in_latin into_french into_spanish into_german",
    "summarise": "summar* tldr tl;dr condense* shorten* main_idea main_point gist",
    "title": "title* headline* slogan* tagline* name_for subject_line caption* hashtag* "
    "catchphrase*",
    "code": "code function program script python* java* sql html* css regex* algorithm* query c++ "
    "``` bash rust golang",
    "essay": "essay* article* blog* report speech* review* paper thesis",
    "story": "story* tale narrative* fable* scene dialog* conversation* plot screenplay*",
    "poem": "poem* haiku* limerick* sonnet* song* rhyme* lyrics* verse*",
    "letter": "email* e-mail* letter message* tweet* note post cover_letter invitation*",
    "plan": "plan itinerary* schedule step steps recipe* instruction instructions guide "
    "tutorial* strategy* process procedure*",
    "list": "list enumerate* example examples idea ideas tip tips ways reasons brainstorm* "
    "suggest*",
    "compare": "compar* contrast* differen* versus vs pros_and_cons advantages*",
    "explain": "explain* describe* discuss* elaborate* analyze* analyse* evaluate* assess* "
    "outline* how_do how_does how_can how_to how_would how_should how_is how_are why "
    "provide_an_explanation provide_an_overview provide_a_description",
    "define": "defin* meaning* mean means what_is what_are synonym* antonym*",
    "compute": "calculat* comput* solve* sum equation* area how_many how_much how_old how_long "
    "how_far how_tall average* probabilit* convert",
    "create": "creat* generat* compose* write come_up design* develop* draft* produce* construct* "
    "build invent*",
    "extract": "extract* find locate* highlight* underline* spot identify*",
    "order": "sort rank arrange* order alphabetical* group categories",
    "complete": "complet* fill_in blank* finish* continue* next ___",
    "short": "brief* short concise* quick* simple one-word one_word one-line one-sentence single "
    "succinct* just only",
    "long": "detail* in-depth comprehensive* thorough* long extensive* complete full "
    "step-by-step step_by_step exhaust* at_least more_than minimum",
    "limit": "at_most no_more_than less_than maximum under up_to limit within",
    "reason": "proof* prove derive* think_step show_your justify* reasoning* because",
    "table": "table json xml csv yaml chart markdown*",
    "question": "question questions quiz survey* interview*",
    "role": "act_as you_are pretend* imagine* role i_want_you",
    "sentence": "sentence sentences phrase proverb* quote",
    "word": "word words letter letters acronym* adjective* verb verbs noun nouns",
    "paragraph": "paragraph* passage text",
    "first_person": "i my me i'm",
}
"""Words that speak for a kind of task: ``*`` stands for any ending, ``_`` for a space."""


def _pattern(words: str) -> re.Pattern[str]:
    parts = []
    for word in words.split():
        plain = word if word == "___" else word.replace("_", " ")
        start = r"\b" if plain[0].isalnum() else ""
        end = r"\b" if plain[-1].isalnum() else ""
        parts.append(start + re.escape(plain.removesuffix("*")) + end)
    return re.compile("|".join(parts))


_KIND = [_pattern(words) for words in _KINDS.values()]
_FORM = (
    "prompt_tokens",
    "characters",
    "asked_words",
    "rest_words",
    "rest_characters",
    "lines",
    "rest_lines",
    "sentences",
    "full_stops",
    "question_marks",
    "ends_with_question",
    "digits",
    "symbols",
    "capitals",
    "not_ascii",
    "word_length",
    "quotes",
    "colons",
    "commas",
    "options",
    "asks_wh",
    "asks_yes_no",
    "largest_number",
    "range",
    "quoted_characters",
)
CUES = (*_FORM, *(f"amount_{name}" for name in (*_UNITS, "items")), *_KINDS)
"""Names of the cues, in their order."""

_WH = frozenset(("what", "who", "when", "where", "which", "whose", "whom"))
_YES_NO = frozenset(
    ("is", "are", "was", "were", "do", "does", "did", "can", "could", "will", "would", "should")
)
_OPENING, _CLOSING = 400, 200
"""Characters of what is asked that are searched for words, from its beginning and its end."""
_OPTION = re.compile(r"(?m)^\s*(?:\(?[A-Ja-j][.):]|\d{1,2}[.)]|[-*•])\s")
_DIGITS = re.compile(r"\d+")
_CAPITALS = re.compile(r"[A-Z]")


def cues_of(
    asked: str,
    rest: str,
    asked_words: Sequence[str],
    rest_words: Sequence[str],
    *,
    characters: int,
    prompt_tokens: int,
) -> Cues:
    """The cues of a prompt, in the order of ``CUES``.

    Args:
        asked: its first paragraph, or what is looked at of it.
        rest: what follows.
        asked_words: words of the former.
        rest_words: words of the latter.
        characters: its length.
        prompt_tokens: the same in tokens.
    """
    low = asked.lower()
    if len(low) > _OPENING + _CLOSING:
        low = f"{low[:_OPENING]} … {low[-_CLOSING:]}"
    amounts = [_amount(pattern, low) for pattern in (*_AMOUNTS, _ITEMS)]
    kinds = [1.0 if pattern.search(low) else 0.0 for pattern in _KIND]
    form = _form(asked, rest, asked_words, len(rest_words), characters, prompt_tokens)
    return np.array([*form, *amounts, *kinds], dtype=np.float32)


def _form(
    asked: str,
    rest: str,
    asked_words: Sequence[str],
    rest_words: int,
    characters: int,
    prompt_tokens: int,
) -> tuple[float, ...]:
    log, text = math.log1p, f"{asked}\n{rest}" if rest else asked
    first = asked_words[0] if asked_words else ""
    words = max(len(asked_words), 1)
    return (
        log(prompt_tokens),
        log(characters),
        log(len(asked_words)),
        log(rest_words),
        log(max(characters - len(asked), 0)),
        log(text.count("\n")),
        log(rest.count("\n")),
        log(text.count(". ") + text.count(".\n")),
        log(text.count(".")),
        log(text.count("?")),
        float(text.endswith("?")),
        log(sum(map(len, _DIGITS.findall(text)))),
        log(sum(text.count(symbol) for symbol in "{}();=<>")),
        len(_CAPITALS.findall(asked)) / words,
        (len(text) - len(text.encode("ascii", "ignore"))) / max(len(text), 1),
        sum(map(len, asked_words)) / words,
        log(text.count('"')),
        log(text.count(":")),
        log(text.count(",")),
        log(len(_OPTION.findall(text))),
        float(first in _WH),
        float(first in _YES_NO),
        log(max((int(number[:6]) for number in _DIGITS.findall(asked)), default=0)),
        _range(asked),
        log(max((len("".join(quoted)) for quoted in _QUOTED.findall(asked)), default=0)),
    )


def _range(text: str) -> float:
    """The logarithm of how many whole numbers the first range holds, -1 if none is named."""
    found = _RANGE.search(text)
    return -1.0 if found is None else math.log1p(abs(int(found[1]) - int(found[2])) + 1)


def _amount(pattern: re.Pattern[str], text: str) -> float:
    """The logarithm of the first amount that is named, -1 if there is none."""
    found = pattern.search(text)
    if found is None:
        return -1.0
    number = found.group(1)
    return math.log1p(_NUMBERS.get(number) or int(number))
