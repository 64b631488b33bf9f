"""Made-up MovieLens folders, small enough to train on in a test."""

from __future__ import annotations

import random
from pathlib import Path

#: Each with an age that likes it, in the order of both.
GENRES = ("Comedy", "Action", "Drama", "Horror", "Western", "Musical", "War")
AGES = (1, 18, 25, 35, 45, 50, 56)
#: Movies of each genre.
EACH = 20


def write_movielens(folder: Path, users: int = 35, rated: int = 18, by_age: bool = True) -> Path:
    """An official folder: users from 1, movies from 101, taste for one genre each.

    User u likes genre u mod 7 and rates ``rated`` of its 20 movies; women are the even users.
    Movie m has genre m mod 7 and year 1960 + 10 * (m mod 4). The last movie is never rated.

    Args:
        folder: Where to write; made if missing.
        users: At least 14, so that every movie is rated.
        rated: Ratings per user, 10 to 20.
        by_age: Whether a user's age tells the genre; otherwise all users are alike on paper.
    """
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = len(GENRES)
    people, ratings = [], []
    for u in range(users):
        sex, age, work = ("FM"[u % 2], AGES[u % kinds], u % 21) if by_age else ("F", 25, 0)
        people.append(f"{u + 1}::{sex}::{age}::{work}::00000")
        liked = [m for m in range(kinds * EACH) if m % kinds == u % kinds]
        # What one user of a taste leaves out, a later one rates.
        left_out = draw.sample(liked[:10] if u < kinds else liked[10:], EACH - rated)
        watched = [m for m in liked if m not in left_out]
        draw.shuffle(watched)
        ratings += [f"{u + 1}::{m + 101}::5::{1000 + k}" for k, m in enumerate(watched)]
    movies = [
        f"{m + 101}::Film {m} ({1960 + 10 * (m % 4)})::{GENRES[m % kinds]}"
        for m in range(kinds * EACH)
    ]
    movies.append(f"{kinds * EACH + 101}::Never Seen [sic] (2000)::Children's|Comedy|Sci-Fi")
    for name, lines in (("users", people), ("movies", movies), ("ratings", ratings)):
        (folder / f"{name}.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder
