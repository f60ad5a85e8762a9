"""The databases and questions of the env `text_to_sql`: tables filled from a seed, questions with the SQL that answers them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = str | int | float
Table: TypeAlias = list[tuple[Value, ...]]

NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ian", "June", "Kim", "Leo", "Mia", "Noor", "Otis", "Pia")
CITIES = ("Bergen", "Lyon", "Porto", "Quito", "Riga")
ITEMS = ("lamp", "chair", "desk", "rug", "mirror")
GENRES = ("crime", "poetry", "travel", "history")
SUBJECTS = ("maths", "biology", "music", "history")
TEAMS = ("sales", "design", "support", "research")


@dataclass(frozen=True)
class Schema:
    """`fill` makes the rows of each table; questions and their SQL have {city}, {item} ... and {k}, a number of `range_k`."""

    create: str
    fill: Callable[[random.Random], dict[str, Table]]
    range_k: tuple[int, int]
    questions: Sequence[tuple[str, str]]


def _shop(rng: random.Random) -> dict[str, Table]:
    names = rng.sample(NAMES, 10)
    customers: Table = [(i, name, rng.choice(CITIES), rng.randrange(18, 80)) for i, name in enumerate(names, 1)]
    orders: Table = [(i, rng.randrange(1, 11), rng.choice(ITEMS), rng.randrange(1, 9), rng.randrange(5, 200))
                     for i in range(1, rng.randrange(30, 45))]  # fmt: skip
    return {"customers": customers, "orders": orders}


def _library(rng: random.Random) -> dict[str, Table]:
    books: Table = [(i, f"{rng.choice(('The', 'A'))} {rng.choice(('Old', 'Last', 'Green', 'Silent'))} {rng.choice(ITEMS)} {i}",
                     rng.choice(GENRES), rng.randrange(1950, 2025)) for i in range(1, 21)]  # fmt: skip
    loans: Table = [(i, rng.randrange(1, 21), rng.choice(NAMES), rng.randrange(1, 60)) for i in range(1, rng.randrange(35, 50))]
    return {"books": books, "loans": loans}


def _school(rng: random.Random) -> dict[str, Table]:
    students: Table = [(i, name, rng.randrange(1, 5)) for i, name in enumerate(rng.sample(NAMES, 14), 1)]
    pairs = [(student, subject) for student in range(1, 15) for subject in SUBJECTS if rng.random() < 0.7]
    return {"students": students, "grades": [(student, subject, rng.randrange(1, 101)) for student, subject in pairs]}


def _company(rng: random.Random) -> dict[str, Table]:
    teams: Table = [(i, name, rng.choice(CITIES)) for i, name in enumerate(TEAMS, 1)]
    staff: Table = [(i, name, rng.randrange(1, 5), 1000 * rng.randrange(30, 120), rng.randrange(2000, 2025))
                    for i, name in enumerate(rng.sample(NAMES, 15), 1)]  # fmt: skip
    return {"teams": teams, "employees": staff}


SCHEMAS: dict[str, Schema] = {
    "shop": Schema(
        "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, age INTEGER);\n"
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers(id), item TEXT,"
        " quantity INTEGER, price INTEGER);",
        _shop, (20, 70),
        (
            ("How many customers are older than {k}?", "SELECT COUNT(*) FROM customers WHERE age > {k}"),
            ("What are the names of the customers from {city}?", "SELECT name FROM customers WHERE city = '{city}'"),
            ("How many orders of a {item} are there?", "SELECT COUNT(*) FROM orders WHERE item = '{item}'"),
            ("How many units of each item were ordered? Give item and number.",
             "SELECT item, SUM(quantity) FROM orders GROUP BY item"),
            ("How much was spent in all on each {item} order of more than one unit, quantity times price? Give id and amount.",
             "SELECT id, quantity * price FROM orders WHERE item = '{item}' AND quantity > 1"),
            ("Which customers ordered a {item}? Give each name once.",
             "SELECT DISTINCT name FROM customers JOIN orders ON customer_id = customers.id WHERE item = '{item}'"),
            ("Give the names of the customers who never ordered a {item}.",
             "SELECT name FROM customers WHERE id NOT IN (SELECT customer_id FROM orders WHERE item = '{item}')"),
            ("List names and ages of the customers over {k}, the oldest first, equal ages by name.",
             "SELECT name, age FROM customers WHERE age > {k} ORDER BY age DESC, name"),
        ),
    ),
    "library": Schema(
        "CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, genre TEXT, year INTEGER);\n"
        "CREATE TABLE loans (id INTEGER PRIMARY KEY, book_id INTEGER REFERENCES books(id), reader TEXT, days INTEGER);",
        _library, (1955, 2020),
        (
            ("How many {genre} books are there?", "SELECT COUNT(*) FROM books WHERE genre = '{genre}'"),
            ("What are the titles of the books from after {k}?", "SELECT title FROM books WHERE year > {k}"),
            ("From what year is the oldest {genre} book?", "SELECT MIN(year) FROM books WHERE genre = '{genre}'"),
            ("Which readers borrowed a {genre} book? Give each once.",
             "SELECT DISTINCT reader FROM loans JOIN books ON book_id = books.id WHERE genre = '{genre}'"),
            ("How many loans had each genre? Give genre and number.",
             "SELECT genre, COUNT(*) FROM loans JOIN books ON book_id = books.id GROUP BY genre"),
            ("What are the titles of the books that were never lent?",
             "SELECT title FROM books WHERE id NOT IN (SELECT book_id FROM loans)"),
            ("For how many days in all did {name} borrow books?", "SELECT SUM(days) FROM loans WHERE reader = '{name}'"),
            ("List title and year of the {genre} books by year, equal years by title.",
             "SELECT title, year FROM books WHERE genre = '{genre}' ORDER BY year, title"),
        ),
    ),
    "school": Schema(
        "CREATE TABLE students (id INTEGER PRIMARY KEY, name TEXT, year INTEGER);\n"
        "CREATE TABLE grades (student_id INTEGER REFERENCES students(id), subject TEXT, points INTEGER);",
        _school, (20, 90),
        (
            ("How many students have more than {k} points in {subject}?",
             "SELECT COUNT(*) FROM grades WHERE subject = '{subject}' AND points > {k}"),
            ("What is the highest number of points in {subject}?",
             "SELECT MAX(points) FROM grades WHERE subject = '{subject}'"),
            ("What is the average number of points in each subject? Give subject and average.",
             "SELECT subject, AVG(points) FROM grades GROUP BY subject"),
            ("Give the names of the students with more than {k} points in {subject}.",
             "SELECT name FROM students JOIN grades ON student_id = id WHERE subject = '{subject}' AND points > {k}"),
            ("Which students have no grade in {subject}?",
             "SELECT name FROM students WHERE id NOT IN (SELECT student_id FROM grades WHERE subject = '{subject}')"),
            ("How many students are in each year? Give year and number.", "SELECT year, COUNT(*) FROM students GROUP BY year"),
            ("List name and points of all with a grade in {subject}, the best first, equal points by name.",
             ("SELECT name, points FROM students JOIN grades ON student_id = id WHERE subject = '{subject}'"
              " ORDER BY points DESC, name")),
        ),
    ),
    "company": Schema(
        "CREATE TABLE teams (id INTEGER PRIMARY KEY, name TEXT, city TEXT);\n"
        "CREATE TABLE employees (id INTEGER PRIMARY KEY, name TEXT, team_id INTEGER REFERENCES teams(id), salary INTEGER,"
        " joined INTEGER);",
        _company, (2002, 2020),
        (
            ("How many employees joined after {k}?", "SELECT COUNT(*) FROM employees WHERE joined > {k}"),
            ("What are the names of the employees of the {team} team?",
             "SELECT employees.name FROM employees JOIN teams ON team_id = teams.id WHERE teams.name = '{team}'"),
            ("What is the highest salary in the {team} team?",
             "SELECT MAX(salary) FROM employees JOIN teams ON team_id = teams.id WHERE teams.name = '{team}'"),
            ("How many employees has each team? Give the team's name and the number; leave out teams without any.",
             "SELECT teams.name, COUNT(*) FROM employees JOIN teams ON team_id = teams.id GROUP BY teams.id"),
            ("What do all employees who joined in {k} or earlier earn together?",
             "SELECT SUM(salary) FROM employees WHERE joined <= {k}"),
            ("Which employees earn more than the average of all?",
             "SELECT name FROM employees WHERE salary > (SELECT AVG(salary) FROM employees)"),
            ("List the names of the three who joined last, the newest first, equal years by name.",
             "SELECT name FROM employees ORDER BY joined DESC, name LIMIT 3"),
        ),
    ),
}  # fmt: skip


def draw_question(schema: Schema, rng: random.Random) -> tuple[str, str]:
    """A question and its SQL."""
    question, sql = rng.choice(schema.questions)
    values = {
        "k": rng.randint(*schema.range_k), "city": rng.choice(CITIES), "item": rng.choice(ITEMS), "name": rng.choice(NAMES),
        "genre": rng.choice(GENRES), "subject": rng.choice(SUBJECTS), "team": rng.choice(TEAMS),
    }  # fmt: skip
    return question.format(**values), sql.format(**values)


def script(schema: Schema, seed: str) -> str:
    """The SQL that makes the tables and fills them."""
    lines = [schema.create]
    for table, rows in schema.fill(random.Random(seed)).items():
        lines.append(f"INSERT INTO {table} VALUES {', '.join(map(_literal, rows))};")
    return "\n".join(lines)


def _literal(row: tuple[Value, ...]) -> str:
    quoted = ("'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value) for value in row)
    return "(" + ", ".join(quoted) + ")"
