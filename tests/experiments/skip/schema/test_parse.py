"""Schemas: what they declare, and every damage with its line."""

from __future__ import annotations

import re

import pytest

from maskmoe_kernels.errors import DataError
from maskmoe_kernels.experiments.skip.schema.parse import parse_schema, read_schema, shipped
from maskmoe_kernels.layout.families import skip_sessions
from tests.experiments.skip.logs import TEXT


def test_mssd_is_a_schema_with_the_groups_and_experts_of_the_paper() -> None:
    family, second = skip_sessions()
    schema = shipped("mssd")
    assert (schema.family.groups, schema.family.subsets) == (family.groups, family.subsets)
    assert schema.second_groups == second
    assert schema.first_columns[schema.label_column] == "skip_2"


def test_users_has_ten_experts_and_masks_the_interactions_in_b() -> None:
    schema = shipped("users")
    assert list(schema.experts) == [f"S{k}" for k in range(1, 11)]
    assert schema.experts["S1"] == ("persistence",)
    assert "persistence" not in schema.second_groups
    assert not {"skipped", "place"} & set(schema.second_columns)
    assert set(schema.experts["S10"]) == set(schema.first_groups)
    assert {name for of in schema.sums.values() for name in of} == set(schema.experts) - {"S10"}


def test_a_schema_of_ones_own() -> None:
    schema = parse_schema(TEXT)
    assert schema.first_groups == {"given": 4, "past": 7, "goods": 6, "who": 3}
    assert schema.second_groups == {"past": 7, "goods": 6, "who": 3}
    assert schema.embedding == ("who", 3)
    assert schema.sessions.gap == 30 * 60_000
    assert schema.past["pair_rate"].half_life == 2 * 3_600_000
    assert schema.second_columns[7:13] == (
        "weight", "shelf_top", "shelf_middle", "shelf_low", "day_sin", "day_cos",
    )  # fmt: skip


# What is replaced by what, and the message; the line is that of what is there then.
DAMAGES = [
    ("[events]", "[events", "expected TOML, got an error"),
    ('name = "shop"', "", "expected name in the file"),
    ('name = "shop"', "name = 3", "expected name to be a text, got 3"),
    ('name = "shop"', 'name = "shop"\nnmae = "x"', "expected one of the keys .* got 'nmae'"),
    ('by = "inactivity"', 'by = "day"', "one of file, id, inactivity, got 'day'"),
    ('gap = "30 minutes"', 'gap = "30 parsecs"', "expected gap to be a duration such as"),
    ('gap = "30 minutes"', "", "expected a gap with by"),
    ('gap = "30 minutes"', 'gap = "9999999999 days"', "expected gap to be at most 84,000 days"),
    ("shortest = 2", "shortest = 50", "expected 2 <= shortest <= longest"),
    ("longest = 40", "longest = 40\nslice = 41", "expected slice to be from 2 to longest"),
    ("longest = 40", 'longest = 40\nsplit = "item"', "one of session, user, got 'item'"),
    ('user = "who"', "", "expected user in events"),
    ('label = "left"', 'label = "price"', r"a column of kind flag \(left\), got 'price'"),
    ('left = { kind = "flag" }', 'left = { kind = "bool" }', "expected kind to be one of id, flag"),
    ("low = 0, high = 100 }", "low = 0 }", "expected high in events.columns.price"),
    ("low = 0, high = 100 }", "low = 9, high = 1 }", "expected low <= high, got 9 and 1"),
    ('low = 0, high = 10, log = "1p"', 'low = -1, high = 10, log = "1p"', "values whose log"),
    ('names = ["phone", "desk"]', 'names = ["desk", "desk"]', "an array of different texts"),
    ('key = "what"', "", "expected key, and no other column of kind id"),
    ('of = "pair", half_life = "2 hours"', 'of = "pair"', "expected half_life with discounted"),
    ('of = "pair", half_life = "2 hours"', 'of = "item", half_life = "2 hours"', 'got "item"'),
    ('relation = "wanted" }', 'relation = "bought" }', "one of wanted, got 'bought'"),
    ('window = "90 minutes"', "window = 90", "expected window to be a text, got 90"),
    ('  "past.seen",', '  "past.sene",', "expected a feature of one of .* got 'past.sene'"),
    ('halves = "A"', 'halves = "BA"', "expected halves to be one of A, B, AB, got 'BA'"),
    ('halves = "A"', 'halves = "B"', "no group of half A holds the label 'left'"),
    ('["item.weight",', '[{ of = "left", name = "x" },', "the label left in groups of half A"),
    ('past = ["past"]', 'past = { A = ["past"] }', "expected B in experts.past"),
    ('past = ["past"]', 'past = { A = [], B = ["given"] }', "groups of half B out of past, goo"),
    ('past = ["past"]', 'past = { A = [], B = ["past"], C = [] }', "one of the keys A, B, got 'C'"),
    ('past = ["past"]', 'past = { A = ["who"], B = [] }', "the embedding who in both halves or"),
    ('past = ["past"]', 'past = []\nnone = { A = [], B = [] }', "inclusion must be an order"),
    ('halves = "A"', 'halves = "AB"', "the label left in groups of half A alone"),
    ('["left", { of = "place"', '[{ of = "place"', "no group of half A holds the label 'left'"),
    ('as = "one_hot" }', 'as = "circle" }', "of a column of kind integer, got device of kind name"),
    ('who = ["who"]', 'who = ["whom"]', "expected groups out of given, past, goods, who, got"),
    ('who = ["who"]', 'who = ["past"]', "inclusion must be an order"),
    ('all = ["given", "past", "goods", "who"]', 'all = ["given", "past", "who"]',
     r"every group in an expert, got \['goods'\] in none"),
    ("width = 3", "width = 0", "expected width from 1 to 512, got 0"),
    ('  "past.wanted",', '  "past.wanted",\n  "past.sold",', "each feature once, got .'sold'."),
    ('true = "left"', 'true = "left"\nsession = "{where}"', r"expected fields out of .*'where'"),
    ("sold = {", "price = {", "expected another name than price, a column's"),
    ("price =", "track =", "expected other names than .'track'., which shards use"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), DAMAGES, ids=[d[2][:40] for d in DAMAGES])
def test_every_damage_says_file_and_line(old: str, new: str, message: str) -> None:
    assert TEXT.count(old) >= 1
    with pytest.raises(DataError, match=rf"^own\.toml, line \d+: .*{message}") as caught:
        parse_schema(TEXT.replace(old, new, 1), "own.toml")
    found = re.search(r"line (\d+)", str(caught.value))
    assert found is not None
    line = int(found[1])
    # The line of the damage, or, where something is missing, of the table it is missing in.
    lines = TEXT.replace(old, new, 1).splitlines()
    pairs = enumerate(zip(lines, TEXT.splitlines(), strict=False), 1)
    changed = next((i for i, (a, b) in pairs if a != b), len(lines))
    assert abs(line - changed) <= 12 or lines[line - 1].startswith("[") or line == 1


def test_experts_may_differ_in_the_two_halves() -> None:
    text = TEXT.replace('past = ["past"]', 'past = { A = [], B = ["past"] }')
    text = text.replace(
        "[groups.who]",
        """[groups.later]
halves = "B"
features = [{ of = "price", divide = 100 }]

[groups.who]""",
    ).replace('all = ["given", ', 'all = ["given", "later", ')
    text += '\n[causes]\nrate = ["past", "goods"]\n'
    schema = parse_schema(text)
    assert schema.first_groups == {"given": 4, "past in A": 7, "goods": 6, "who": 3}
    assert schema.second_groups == {"past in B": 7, "goods": 6, "later": 1, "who": 3}
    assert schema.family.subsets == {
        "given": ("given",),
        "past": ("past in B",),
        "who": ("who",),
        "all": ("given", "past in A", "past in B", "goods", "later", "who"),
    }
    assert schema.causes == {"rate": {"past in B", "goods"}}
    assert len(schema.first_columns) == 20
    assert schema.second_columns[-4] == "price"
    with pytest.raises(DataError, match=r"other names of groups than .'past in B'."):
        parse_schema(
            text.replace("groups.later", 'groups."past in B"').replace('"later"', '"past in B"')
        )


def test_a_relation_may_not_have_the_name_of_a_table() -> None:
    text = TEXT.replace("relations.wanted", "relations.events").replace('"wanted" }', '"events" }')
    with pytest.raises(DataError, match=r"line 34: expected another name than 'events'"):
        parse_schema(text)


def test_lines_are_exact_where_a_value_is_wrong() -> None:
    for old, new in (('by = "inactivity"', "by = 1"), ('  "past.sold",', '  "past.x",')):
        text = TEXT.replace(old, new)
        line = text.splitlines().index(new) + 1
        with pytest.raises(DataError, match=rf"line {line}: "):
            parse_schema(text)
    line = TEXT.splitlines().index("[groups.given]") + 1  # the first of all groups
    with pytest.raises(
        DataError, match=rf"line {line}: .*the label left in groups of half A alone"
    ):
        parse_schema(TEXT.replace('["item.weight",', '[{ of = "left", name = "x" },'))


def test_a_schema_that_is_not_there() -> None:
    with pytest.raises(DataError, match=r"nowhere\.toml: expected a schema .*mssd, users"):
        read_schema("nowhere.toml")
