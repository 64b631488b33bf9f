"""A made-up MovieLens of three users and six movies, as files that tests may damage."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from maskmoe_kernels.experiments.movielens.data.negatives import sample_training_pairs
from maskmoe_kernels.experiments.movielens.data.split import Split
from maskmoe_kernels.experiments.movielens.data.tables import MovieLens

# Ids are neither sorted nor dense, one movie is never rated, timestamps tie and are unsorted.
LINES = {
    "users.dat": ["10::F::1::10::48067", "7::M::56::20::70072", "3::M::25::0::55117-1234"],
    "movies.dat": [
        "5::Toy Story (1995)::Animation|Children's|Comedy",
        "2::Star Wars: Episode IV (1977)::Action|Sci-Fi",
        "9::Misérables, Les (1995)::Drama|Musical",
        "4::Heat (1995)::Action|Crime|Thriller",
        "8::Never Seen (2000)::Western",
        "6::Café (1993)::Comedy",
    ],
    "ratings.dat": [
        "7::2::5::100",
        "7::5::4::300",
        "10::9::3::50",
        "7::9::3::200",
        "10::2::1::70",
        "10::4::2::70",
        "3::6::5::10",
        "3::4::5::10",
        "3::2::5::10",
        "10::5::5::60",
    ],
}


def write_folder(folder: Path, **changed: bytes) -> Path:
    """The made-up set; ``changed`` replaces the bytes of ``users``, ``movies`` or ``ratings``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in LINES.items():
        content = changed.get(name.removesuffix(".dat"))
        if content is None:
            content = ("\n".join(lines) + "\n").encode("latin-1")
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, folder: Path, prefix: str = "ml-1m/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in LINES:
            archive.write(folder / name, prefix + name)
    return path


def with_line(name: str, line: int, text: str) -> bytes:
    lines = list(LINES[name])
    lines[line - 1] = text
    return ("\n".join(lines) + "\n").encode("latin-1")


def training_pairs(
    data: MovieLens, split: Split, seed: int, ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """An epoch of training pairs: users, items and targets."""
    generator = torch.Generator().manual_seed(seed)
    return sample_training_pairs(
        split, split.interacted_train, data.rated_items, ratio, generator=generator
    )
