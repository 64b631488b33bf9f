"""Users, movies, and what an expert knows of them, in words."""

from __future__ import annotations

from torch import Tensor

from maskmoe_kernels.experiments.movielens.data.tables import SEXES, MovieLens

# Names of the codes in users.dat, in the order of AGES and of the official README.
AGE_NAMES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
OCCUPATION_NAMES = (
    "other or not specified", "academic/educator", "artist", "clerical/admin",
    "college/grad student", "customer service", "doctor/health care", "executive/managerial",
    "farmer", "homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales/marketing",
    "scientist", "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed",
    "writer",
)  # fmt: skip
SEX_NAMES = {"F": ("woman", "women"), "M": ("man", "men")}
# In the order of GENRES.
_GENRE_NAMES = (
    "action movies", "adventure movies", "animated movies", "children's movies", "comedies",
    "crime movies", "documentaries", "dramas", "fantasy movies", "films noirs", "horror movies",
    "musicals", "mysteries", "romances", "science fiction movies", "thrillers", "war movies",
    "westerns",
)  # fmt: skip


def reason_in_words(data: MovieLens, user: int, movie: int, expert: str, favours: bool) -> str:
    """What ``expert`` looked at for a user row and a movie row.

    Args:
        expert: ``"content"``, ``"user"``, ``"item"`` or ``"all"``.
        favours: Whether it speaks for the movie.

    Raises:
        KeyError: Another expert.
    """
    kind = kind_of(data, movie)
    if expert == "content":
        if favours:
            return f"like other {kind}, among {people_like(data, user)}"
        return f"{kind} are seldom watched among {people_like(data, user)}"
    if expert == "user":
        similar, rated = similar_and_rated(data, user, movie)
        fact = f" ({similar} of {rated} rated movies)" if similar else ""
        return (
            f"this user's taste for {kind}{fact}"
            if favours
            else f"not to this user's taste: {kind}"
        )
    if expert == "item":
        viewers = f"viewers like this one ({people_like(data, user)}, {occupation_of(data, user)})"
        return f"liked by {viewers}" if favours else f"seldom watched by {viewers}"
    return {
        ("all", True): "personal to this user",
        ("all", False): "personal: this movie does not suit this user",
    }[expert, favours]


def same_in_words(data: MovieLens, user: int, movie: int, expert: str) -> str:
    """What ``expert`` knows of a user row and a movie row, and that it suffices.

    Raises:
        KeyError: Another expert.
    """
    kind, people = kind_of(data, movie), people_like(data, user)
    similar, rated = similar_and_rated(data, user, movie)
    known = {
        "content": f"that these are {kind}, and the user is one of the {people}",
        "user": f"this user's ratings ({similar} of {rated} of such movies), and that these are "
        f"{kind}",
        "item": f"who watches this movie, and that the user is one of the {people}",
        "all": "",
    }[expert]
    if expert == "all":
        return "it takes both: this user's ratings and who watches this movie"
    return f"the answer would be the same knowing only {known}"


def group_in_words(data: MovieLens, user: int, movie: int, group: str) -> str:
    """What is known of a user row and a movie row by ``group``, "content", "user" or "item".

    Raises:
        KeyError: Another group.
    """
    similar, rated = similar_and_rated(data, user, movie)
    return {
        "content": f"{people_like(data, user)}, {kind_of(data, movie)}",
        "user": f"this user's ratings ({similar} of {rated} of such movies)",
        "item": "who watches this movie",
    }[group]


def _telling_genres(data: MovieLens, movie: int, most: int = 2) -> list[int]:
    """The rarest genres of a movie, at most ``most``, in the order of ``GENRES``."""
    count = data.genres.sum(0)
    own = data.genres[movie].nonzero().flatten().tolist()
    return sorted(sorted(own, key=lambda g: float(count[g]))[:most])


def kind_of(data: MovieLens, movie: int) -> str:
    """Such as "comedies and dramas of the 90s"."""
    names = [_GENRE_NAMES[g] for g in _telling_genres(data, movie)] or ["movies"]
    if len(names) == 2 and all(name.endswith(" movies") for name in names):
        names[0] = names[0].removesuffix(" movies")
    return f"{' and '.join(names)} of {decade(int(data.year[movie]))}"


def decade(year: int) -> str:
    """``"the 90s"``; with the century where that would be unclear."""
    tens = year // 10 * 10
    return f"the {tens % 100:02d}s" if 1930 <= year < 2000 else f"the {tens}s"


def similar_and_rated(data: MovieLens, user: int, movie: int) -> tuple[int, int]:
    """How many other movies of a kind the user rated, and how many movies at all.

    The kind is the one the reason names: the same decade and any of the telling genres.
    """
    rated = seen_by(data, user)
    others = rated[rated != movie]
    common = data.genres[others][:, _telling_genres(data, movie)].any(1)
    same = data.year[others] // 10 == data.year[movie] // 10
    return int((common & same).sum()), len(rated)


def people_like(data: MovieLens, user: int) -> str:
    """Those whom content cannot tell from a user row, such as "women of 25-34"."""
    plural = SEX_NAMES[SEXES[int(data.sex[user])]][1]
    age = int(data.age[user])
    return f"{plural} {AGE_NAMES[0]}" if age == 0 else f"{plural} of {AGE_NAMES[age]}"


def occupation_of(data: MovieLens, user: int) -> str:
    """Such as "artist"."""
    code = int(data.occupation[user])
    return "other occupations" if code == 0 else OCCUPATION_NAMES[code]


def seen_by(data: MovieLens, user: int) -> Tensor:
    """Rows of the movies the user rated, in file order."""
    return data.items[data.users == user]
