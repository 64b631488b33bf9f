"""Statistics of the Music Streaming Sessions Dataset that generated sessions follow.

Sources are published counts: session lengths over the training set (124,950,714 sessions); track
features over 3,706,388 tracks, as rounded quantiles; contexts, premium and reasons over the
167,880 rows of the mini set; skips over its first 134,304 rows. Acoustic vectors, pauses, and the
interactions that accompany a skip are rough shares of 201 rows. Hours and dates are assumptions.
"""

from __future__ import annotations

import numpy as np

#: Number of sessions of 10, 11, ... 20 tracks.
SESSION_LENGTHS = (
    11025730, 9611839, 8407692, 7344162, 6460309, 5664259, 4994670, 4400713, 3917839, 3477536,
    59645965,
)  # fmt: skip

#: Context -> number of rows.
CONTEXTS = {
    "editorial_playlist": 35663, "radio": 21107, "user_collection": 67430, "catalog": 38263,
    "charts": 2441, "personalized_playlist": 2976,
}  # fmt: skip
#: Share of the rows that belong to paying accounts.
PREMIUM = 136053 / 167880
#: Reason for the start of a track -> number of rows.
START = {
    "trackdone": 55075, "fwdbtn": 79912, "backbtn": 13034, "appload": 1942, "trackerror": 92,
    "clickrow": 17514, "playbtn": 155, "remote": 136, "endplay": 20,
}  # fmt: skip
#: Reason for the end of a track -> number of rows.
END = {
    "trackdone": 57701, "fwdbtn": 81389, "backbtn": 13129, "endplay": 14823, "clickrow": 8,
    "logout": 563, "remote": 267,
}  # fmt: skip

#: Share of rows with skip_2: of all rows, of those after a skip, and of those after no skip.
SKIP, SKIP_AFTER_SKIP, SKIP_AFTER_PLAY = 0.517, 0.730, 0.288

#: Reason for the end of a track -> share of the tracks that are skipped.
SKIPPED_OF_END = {
    "trackdone": 0.0, "fwdbtn": 0.846, "backbtn": 1.0, "endplay": 0.28, "clickrow": 0.5,
    "logout": 0.3, "remote": 0.5,
}  # fmt: skip
#: Share of skip_1 where skip_2, of skip_3 where not skip_2, of not_skipped where not skip_3.
SKIP_1_IF_2, SKIP_3_UNLESS_2, PLAYED_UNLESS_3 = 0.84, 0.168, 0.91
#: Share of rows with a context switch.
CONTEXT_SWITCH = 0.035
#: (no, short, long) pause before play -> share of rows.
PAUSES = {(1, 0, 0): 0.687, (0, 1, 1): 0.204, (0, 0, 1): 0.055, (0, 0, 0): 0.054}
#: Share of rows with a seek forward, and with a seek back.
SEEK_FORWARD, SEEK_BACK = 0.005, 0.025

#: Probabilities of the quantiles below.
LEVELS = (0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1)
#: Feature -> its quantiles at ``LEVELS``.
QUANTILES: dict[str, tuple[float, ...]] = {
    "duration": (30, 33, 54.9, 102, 133, 177, 218, 267, 339, 406, 607, 1229, 1800),
    "release_year": (
        1950, 1954, 1965, 1986, 1996, 2006, 2013, 2017, 2018, 2018, 2018, 2018, 2018,
    ),
    "us_popularity_estimate": (
        90, 90, 90.16, 90.82, 91.6, 93.4, 95.7, 97.9, 99.25, 99.8, 99.97, 99.99, 100,
    ),
    "acousticness": (
        0, 0, 1e-5, 3e-4, 0.0024, 0.0273, 0.221, 0.653, 0.905, 0.967, 0.994, 0.995, 0.996,
    ),
    "beat_strength": (
        0, 0.048, 0.123, 0.188, 0.234, 0.332, 0.459, 0.585, 0.691, 0.751, 0.849, 0.926, 1,
    ),
    "bounciness": (
        0, 0.036, 0.097, 0.16, 0.21, 0.321, 0.48, 0.634, 0.746, 0.803, 0.887, 0.944, 0.986,
    ),
    "danceability": (
        0, 0.053, 0.115, 0.215, 0.293, 0.433, 0.573, 0.698, 0.788, 0.832, 0.905, 0.959, 0.998,
    ),
    "dyn_range_mean": (
        0, 2.86, 3.45, 4.2, 4.72, 5.82, 7.52, 9.48, 11.3, 12.6, 15.7, 20.5, 52.6,
    ),
    "energy": (
        0, 0.001, 0.0168, 0.103, 0.2, 0.41, 0.626, 0.807, 0.917, 0.955, 0.989, 0.999, 1,
    ),
    "flatness": (
        0, 0.475, 0.837, 0.902, 0.93, 0.969, 1.002, 1.029, 1.049, 1.059, 1.074, 1.089, 1.168,
    ),
    "instrumentalness": (
        0, 0, 0, 0, 0, 2.5e-7, 2.2e-4, 0.313, 0.875, 0.919, 0.963, 0.99, 1,
    ),
    "liveness": (
        0, 0.02, 0.038, 0.06, 0.073, 0.096, 0.13, 0.27, 0.437, 0.685, 0.949, 0.988, 1,
    ),
    "loudness": (
        -60, -40.6, -30.2, -21.4, -17, -11.75, -8.1, -5.77, -4.19, -3.34, -2, -0.18, 6.27,
    ),
    "mechanism": (
        0, 0.051, 0.091, 0.132, 0.166, 0.269, 0.486, 0.717, 0.86, 0.92, 0.985, 0.999, 1,
    ),
    "organism": (
        0, 0.004, 0.019, 0.079, 0.131, 0.253, 0.455, 0.648, 0.835, 0.891, 0.934, 0.957, 0.979,
    ),
    "speechiness": (
        0, 0.004, 0.021, 0.0243, 0.0289, 0.0365, 0.051, 0.102, 0.262, 0.365, 0.888, 0.956, 0.971,
    ),
    "tempo": (
        0, 35.4, 64.4, 76.1, 81.7, 96.1, 119.6, 139.4, 164, 175, 196, 209, 250,
    ),
    "valence": (
        0, 0.002, 0.031, 0.057, 0.11, 0.252, 0.474, 0.705, 0.871, 0.932, 0.97, 0.987, 1,
    ),
}  # fmt: skip
#: Thousands of tracks in C, C sharp, ... B.
KEYS = (438, 346, 394, 119, 282, 309, 223, 450, 227, 389, 255, 275)
#: Thousands of tracks with 0, 1, ... 5 beats a bar.
TIME_SIGNATURES = (3.3, 45.2, 0, 393.8, 3186.5, 77.6)
#: Share of tracks in a major key.
MAJOR = 0.6515
#: Mean and standard deviation of each acoustic vector.
ACOUSTIC_VECTORS = (
    (-0.46, 0.37), (0.29, 0.19), (0.23, 0.16), (-0.05, 0.27), (-0.05, 0.34), (0.08, 0.10),
    (-0.21, 0.34), (0.02, 0.27),
)  # fmt: skip


def hour_shares() -> tuple[float, ...]:
    """Assumed share of the sessions in each of the 24 hours: fewest at 4 h, most at 16 h."""
    weight = 1.1 - np.cos(2 * np.pi * (np.arange(24) - 4) / 24)
    return tuple((weight / weight.sum()).tolist())
