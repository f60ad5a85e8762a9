"""The made-up world of the env `search`: people, companies and towns, a document each, and questions about them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

Facts: TypeAlias = dict[str, str]  # of one person, company or town; "name" is its title

_START = (
    "Al", "Bren", "Cor", "Dal", "El", "Fen", "Gar", "Hol", "Is", "Jor", "Kel", "Lun", "Mar", "Nor", "Or", "Pel", "Ros", "Tor",
)  # fmt: skip
_MIDDLE = ("a", "e", "i", "o", "ari", "eno", "ila", "ova", "uma")
_END = ("beck", "dan", "dor", "gan", "len", "mir", "nell", "rin", "sen", "ster", "tan", "vik")
_SURNAMES = (
    "Ames", "Boyd", "Crane", "Dahl", "Ekman", "Frost", "Grove", "Hale", "Iver", "Jarvis", "Koch", "Lund", "Moss", "North",
)  # fmt: skip
_INSTRUMENTS = ("cello", "flute", "harp", "oboe", "piano", "trumpet", "violin")
_PRODUCTS = ("bicycles", "clocks", "glass", "kites", "lamps", "locks", "paper", "pumps", "ropes", "soap", "tiles", "violins")
_TRADES = ("a baker", "a botanist", "a carpenter", "an engineer", "a nurse", "a pilot", "a printer", "a teacher")

_DOCUMENTS = {
    "person": "{name} is {trade}, born in {born} in the town of {town}. {name} works for {company} and plays the {instrument}.",
    "company": "{name} is a company in {town}. It was founded in {founded}, makes {product} and employs {staff} people.",
    "town": "{name} is a town on the river {river}. It was first mentioned in {mentioned} and has {inhabitants} inhabitants.",
}
# The kind of a question's subject, where its answer stands ("company.product": of the person's company), the question.
_QUESTIONS = (
    ("person", "born", "In what year was {name} born?"),
    ("person", "town", "In which town was {name} born?"),
    ("person", "instrument", "What instrument does {name} play?"),
    ("person", "company", "For which company does {name} work?"),
    ("company", "founded", "In what year was {name} founded?"),
    ("company", "product", "What does the company {name} make?"),
    ("company", "staff", "How many people does {name} employ?"),
    ("town", "river", "On which river does the town of {name} lie?"),
    ("town", "inhabitants", "How many inhabitants has the town of {name}?"),
    ("person", "company.product", "What does the company make that {name} works for?"),
    ("person", "company.founded", "In what year was the company founded that {name} works for?"),
    ("person", "company.town", "In which town is the company that {name} works for?"),
    ("person", "town.river", "On which river lies the town where {name} was born?"),
    ("person", "town.inhabitants", "How many inhabitants has the town where {name} was born?"),
    ("company", "town.river", "On which river lies the town where the company {name} is?"),
    ("company", "town.mentioned", "In what year was the town first mentioned where the company {name} is?"),
)


@dataclass(frozen=True)
class Document:
    title: str
    text: str


@dataclass(frozen=True)
class Asked:
    """A question, what answers it, and the searches that lead there."""

    question: str
    answers: tuple[str, ...]
    queries: tuple[str, ...]


def world(num_people: int, rng: random.Random) -> tuple[list[Document], list[Asked], list[Asked]]:
    """Its documents, its questions of one search, and those of two."""
    names = _names(num_people // 5 + num_people // 10, rng)
    towns = [_town(name, rng) for name in names[: num_people // 10]]
    companies = [_company(f"{name} {rng.choice(('Works', 'Brothers', 'and Sons'))}", towns, rng)
                 for name in names[num_people // 10 :]]  # fmt: skip
    people = [_person(name, towns, companies, rng) for name in _full_names(num_people, rng)]
    kinds = {"person": people, "company": companies, "town": towns}
    documents = [Document(one["name"], _DOCUMENTS[kind].format(**one)) for kind, all_of in kinds.items() for one in all_of]
    by_name = {one["name"]: one for all_of in kinds.values() for one in all_of}
    one_step, two_steps = [], []
    for kind, path, text in _QUESTIONS:
        step, _, then = path.partition(".")
        for one in kinds[kind]:
            question, name = text.format(**one), one["name"]
            if then:
                two_steps.append(Asked(question, (by_name[one[step]][then],), (name, one[step])))
            else:
                one_step.append(Asked(question, (one[step],), (name,)))
    rng.shuffle(documents)
    return documents, one_step, two_steps


def _town(name: str, rng: random.Random) -> Facts:
    facts = {"name": name, "river": rng.choice(_START) + rng.choice(_MIDDLE)}
    return facts | {"mentioned": str(rng.randrange(900, 1500)), "inhabitants": str(rng.randrange(1000, 99_000))}


def _company(name: str, towns: list[Facts], rng: random.Random) -> Facts:
    facts = {"name": name, "town": rng.choice(towns)["name"], "founded": str(rng.randrange(1850, 2000))}
    return facts | {"product": rng.choice(_PRODUCTS), "staff": str(rng.randrange(20, 2000))}


def _person(name: str, towns: list[Facts], companies: list[Facts], rng: random.Random) -> Facts:
    facts = {"name": name, "town": rng.choice(towns)["name"], "company": rng.choice(companies)["name"]}
    facts |= {"born": str(rng.randrange(1940, 2000)), "instrument": rng.choice(_INSTRUMENTS)}
    return facts | {"trade": rng.choice(_TRADES)}


def _names(count: int, rng: random.Random) -> list[str]:
    """Different ones, longer when there are many."""
    found: dict[str, None] = {}
    while len(found) < count:
        middle = "".join(rng.choices(_MIDDLE, k=min(3, 1 + len(found) // 1000)))
        found[rng.choice(_START) + middle + rng.choice(_END)] = None
    return list(found)


def _full_names(count: int, rng: random.Random) -> list[str]:
    return [f"{first} {rng.choice(_SURNAMES)}" for first in _names(count, rng)]
