"""Tables for the tests of estimators, and estimators that learn in a blink."""

import numpy as np
import pandas as pd

QUICK = {"n_bags": 1, "max_epochs": 3, "units": 4, "top_units": 8, "random_state": 0}


def mixed(rows=300, seed=0):
    """Columns of all kinds, with missing cells, and labels that depend on three of them."""
    random = np.random.default_rng(seed)
    age = random.normal(40, 12, rows).round()
    income = np.where(random.random(rows) < 0.4, 0.0, random.lognormal(3, 1, rows))
    town = random.choice(["Bonn", "Oslo", "Rome"], rows, p=[0.5, 0.3, 0.2]).astype(object)
    member = random.random(rows) < 0.5
    score = (age - 40) / 12 + (town == "Rome") * 2.0 - (income > 0) + 0.3 * random.normal(size=rows)
    frame = pd.DataFrame({"age": age, "income": income, "town": town, "member": member})
    frame.loc[::17, "age"] = np.nan
    frame.loc[3::29, "town"] = None
    return frame, np.where(score > 0, "yes", "no"), score
