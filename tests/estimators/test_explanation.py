"""Explanations: sums, values known in closed form, sufficient subsets, pictures, the report."""

import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("maskmoe_kernels.estimators", reason="the extra sklearn is not installed")

import pandas as pd

from maskmoe_kernels.estimators import InterpretableClassifier, InterpretableRegressor
from maskmoe_kernels.estimators.columns import NumericColumn
from maskmoe_kernels.estimators.plots import curve
from maskmoe_kernels.estimators.whole_model import _grid
from tests.estimators.tables import QUICK, mixed


def wide(rows=200):
    """Eight columns, so that there is no power set, and four classes."""
    frame, _, score = mixed(rows)
    random = np.random.default_rng(4)
    for name in "pqrs":
        frame[name] = random.normal(size=rows)
    return frame, np.digitize(score + frame.p, [-1, 0, 1])


@pytest.fixture(scope="module")
def binary():
    frame, labels, _ = mixed(300)
    return InterpretableClassifier(**QUICK).fit(frame, labels), frame


@pytest.fixture(scope="module")
def of_four():
    frame, labels = wide()
    return InterpretableClassifier(**QUICK, subsets="pairs").fit(frame, labels), frame


def test_contributions_and_base_sum_to_the_log_odds(binary):
    model, frame = binary
    found = model.explain(frame)
    total = found.contributions.to_numpy().sum(1) + found.base
    assert total == pytest.approx(model.decision_function(frame), abs=1e-9)
    probability = model.predict_proba(frame)[:, 1]
    assert total == pytest.approx(np.log(probability / (1 - probability)), abs=1e-9)
    assert [*found.contributions] == [*frame.columns]
    assert found.contributions.index.equals(frame.index)
    assert found.contributions.abs().to_numpy().mean() > 0.01


def test_and_of_every_class_without_a_power_set(of_four):
    model, frame = of_four
    answer = model.decision_function(frame)
    for label in model.classes_:
        found = model.explain(frame, of=label)
        total = found.contributions.to_numpy().sum(1) + found.base
        assert total == pytest.approx(answer[:, label], abs=1e-9)
    found = model.explain(frame)
    assert np.array_equal(found.of, model.predict(frame))
    total = found.contributions.to_numpy().sum(1) + found.base
    assert total == pytest.approx(answer.max(1), abs=1e-9)
    assert found.values.shape == (200, 8, 4)
    assert found.values.sum(-1) == pytest.approx(0, abs=1e-9)


def test_contributions_are_those_of_the_closed_form():
    """y = 2 sin(a) + bc + k with independent columns, whose Shapley values are known."""
    random = np.random.default_rng(0)
    rows = 4000
    frame = pd.DataFrame(random.uniform(-2, 2, (rows, 3)), columns=[*"abc"])
    frame["k"] = random.choice(["u", "v"], rows)
    k = np.where(frame.k == "u", 1.0, -1.0)
    y = 2 * np.sin(frame.a) + frame.b * frame.c + k + 0.1 * random.normal(size=rows)
    model = InterpretableRegressor(n_bags=2, units=16, learning_rate=0.01, random_state=0)
    found = model.fit(frame, y).explain(frame)
    half = frame.b * frame.c / 2
    truth = np.column_stack([2 * np.sin(frame.a), half, half, k])
    error = np.sqrt(np.mean((found.contributions.to_numpy() - truth) ** 2, axis=0))
    assert error.max() < 0.15
    assert truth.std(0).min() > 0.6
    pairs = found.pairs()
    assert np.sqrt(np.mean((pairs["b & c"] - frame.b * frame.c) ** 2)) < 0.25
    assert pairs.drop(columns="b & c").abs().to_numpy().mean() < 0.1


def test_contributions_of_correlated_gaussians_are_those_of_conditional_means():
    """y = 5 + x beta + noise: E[y | x_S] is linear, too, with what x_S says about the others."""
    random = np.random.default_rng(0)
    covariance = np.array([[1, 0.8, 0.3], [0.8, 1, 0], [0.3, 0, 1]])
    x = random.multivariate_normal(np.zeros(3), covariance, 3000)
    beta = np.array([1, -2, 1.5])
    y = 5 + x @ beta + 0.1 * random.normal(size=3000)

    def value(seen):
        other = [k for k in range(3) if k not in seen]
        inside, between = covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, other)]
        return 5 + x[:, seen] @ (beta[seen] + np.linalg.solve(inside, between) @ beta[other])

    truth = np.zeros((3000, 3))
    for order in itertools.permutations(range(3)):
        for k, column in enumerate(order):
            truth[:, column] += (value([*order[: k + 1]]) - value([*order[:k]])) / 6
    model = InterpretableRegressor(n_bags=1, random_state=0, max_epochs=20)
    found = model.fit(pd.DataFrame(x), y).explain(pd.DataFrame(x))
    error = found.contributions.to_numpy() - truth
    assert np.sqrt(np.mean(error**2, axis=0)).max() < 0.2
    # As if columns were independent, c would get 1.5 c: the test can tell.
    assert np.sqrt(np.mean((x * beta - truth) ** 2, axis=0)).min() > 0.27
    assert found.base == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("classes", [2, 3])
def test_contributions_of_independent_columns_are_their_likelihood_ratios(classes):
    """Given the class, columns are independent: log-odds add up over them (naive Bayes)."""
    random = np.random.default_rng(0)
    mean = np.array([[-0.6, 0.4, 0], [0.6, -0.4, 0], [0.6, 1.2, 0]])[:classes]
    y = random.integers(0, classes, 4000)
    x = mean[y] + random.normal(size=(4000, 3))
    log = -((x[:, :, None] - mean.T) ** 2) / 2
    truth = log[..., 1] - log[..., 0] if classes == 2 else log - log.mean(-1, keepdims=True)
    model = InterpretableClassifier(n_bags=1, random_state=0, max_epochs=20)
    found = model.fit(pd.DataFrame(x), y).explain(pd.DataFrame(x))
    error = np.sqrt(np.mean((found.values - truth) ** 2, axis=0))
    assert error.max() < 0.35
    assert error[2].max() < 0.15  # says nothing, gets nothing
    assert truth[:, 0].std(0).max() > 0.9
    assert found.base == pytest.approx(0, abs=0.1)


def test_contributions_along_orders_give_nothing_to_what_adds_nothing():
    """Copies share what one of them says, additive columns keep theirs, noise gets nothing."""
    random = np.random.default_rng(0)
    x = random.uniform(-2, 2, (2000, 8))
    frame = pd.DataFrame(x, columns=[*"abcdefgh"])
    frame["b"] = frame["c"] = frame["a"]
    y = 2 * frame.a + np.sin(2 * frame.d) + 0.1 * random.normal(size=2000)
    model = InterpretableRegressor(n_bags=1, units=16, learning_rate=0.02, random_state=0)
    found = model.fit(frame, y).explain(frame)
    total = found.contributions.to_numpy().sum(1) + found.base
    assert total == pytest.approx(model.predict(frame), abs=1e-9)
    copies = found.contributions[[*"abc"]].sum(axis=1)
    assert np.sqrt(np.mean((copies - 2 * frame.a) ** 2)) < 0.2
    assert np.sqrt(np.mean((found.contributions.d - np.sin(2 * frame.d)) ** 2)) < 0.2
    assert found.contributions[[*"efgh"]].abs().to_numpy().mean() < 0.1
    assert copies.std() > 2


def test_sufficient_subsets_are_the_smallest_that_agree(binary):
    model, frame = binary
    values = model._values(model._read(frame, reset=False)).numpy()
    subsets = [*model.family_.subsets.values()]
    found = model.explain(frame, tolerance=0.3)
    gap = np.abs(values - values[:, [-1]])
    for row in range(0, 300, 7):
        sizes = [len(s) for s, g in zip(subsets, gap[row], strict=True) if g <= 0.3]
        assert len(found.sufficient[row]) == min(sizes)
        assert found.gap[row] == pytest.approx(gap[row, subsets.index(found.sufficient[row])])
    strict = model.explain(frame, tolerance=0)
    assert {len(groups) for groups in strict.sufficient} == {4}
    for group in found.sufficient[0]:
        assert group in found.words(0)
    assert "needs all 4 groups" in strict.words(0)


def texts(ax):
    return [text.get_text() for text in (*ax.get_yticklabels(), *ax.get_xticklabels())]


def test_the_waterfall_ends_at_the_answer(binary):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model, frame = binary
    found = model.explain(frame)
    ax = found.plot(5)
    widths = [bar.get_width() for bar in ax.patches]
    assert sorted(widths) == pytest.approx(sorted(found.contributions.iloc[5]), abs=1e-9)
    top = ax.patches[0]
    assert top.get_x() + top.get_width() == pytest.approx(found.answer[5], abs=1e-9)
    last = ax.patches[-1]
    assert last.get_x() == pytest.approx(found.base, abs=1e-9)
    assert f"town = {frame.town[5]}" in texts(ax)
    assert "age = missing" in texts(found.plot(17))
    few = found.plot(5, most=2)
    assert [bar.get_width() for bar in few.patches][1] == pytest.approx(
        found.contributions.iloc[5].sum() - widths[0], abs=1e-9
    )
    assert "3 others" in texts(few)


def test_it_becomes_an_explanation_of_shap(binary, of_four):
    shap = pytest.importorskip("shap", reason="shap is not installed")
    for model, frame in (binary, of_four):
        found = model.explain(frame)
        converted = found.to_shap()
        assert isinstance(converted, shap.Explanation)
        total = converted.values.sum(1) + converted.base_values
        assert total == pytest.approx(model.decision_function(frame), abs=1e-9)
        assert converted.feature_names == [*frame.columns]
        assert converted.data.shape == (len(frame), len(frame.columns))


def test_the_model_as_a_whole(binary):
    model, frame = binary
    whole = model.explain_global()
    own = model.explain(frame)
    expected = own.contributions.abs().mean()
    assert whole.importance[expected.index].to_numpy() == pytest.approx(expected, abs=0.02)
    assert whole.importance.is_monotonic_decreasing
    assert whole.sufficient.sum() == pytest.approx(1, abs=1e-9)
    alone = np.mean([groups == ("town",) for groups in own.sufficient])
    assert whole.to_frame().loc["town", "suffices alone"] == pytest.approx(alone, abs=0.03)
    values = model._values(model._read(frame, reset=False)).numpy()
    shape = whole.shapes["town"]
    for row in range(0, 300, 11):
        name = "missing" if pd.isna(frame.town[row]) else frame.town[row]
        at = shape.x.tolist().index(name)
        town = model.family_.names.index("town")
        assert shape.y[at] == pytest.approx(values[row, town], abs=1e-6)
    assert whole.shapes["age"].missing is not None
    assert whole.shapes["income"].missing is None
    assert len(whole.pairs) == 6
    columns = [*shape.to_frame().columns]
    assert columns == ["value", "answer"]


def hard_to_read(ax):
    """Text that is small on a phone, cut off, or over other text of its axis."""
    figure = ax.figure
    figure.draw_without_rendering()
    faults = []
    pixels = 358 / figure.get_figwidth()  # 390 less the margins of the page
    for axes in figure.axes:
        ticks = [
            [t for t in labels if low <= t.get_position()[k] <= high]
            for k, (labels, (low, high)) in enumerate(
                [
                    (axes.get_xticklabels(), axes.get_xlim()),
                    (axes.get_yticklabels(), axes.get_ylim()),
                ]
            )
        ]
        others = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        shown = [[t for t in part if t.get_text() and t.get_visible()] for part in (*ticks, others)]
        for text in [*itertools.chain(*shown), *legends]:
            box, whole = text.get_window_extent(), figure.bbox
            if text.get_fontsize() / 72 * pixels < 9:
                faults.append(f"{text.get_text()!r} is small")
            if box.x0 < -1 or box.y0 < -1 or box.x1 > whole.x1 + 1 or box.y1 > whole.y1 + 1:
                faults.append(f"{text.get_text()!r} is cut off")
        for part in shown[:2]:
            turned = any(text.get_rotation() for text in part)
            for one, next_one in itertools.pairwise([] if turned else part):
                if one.get_window_extent().overlaps(next_one.get_window_extent()):
                    faults.append(f"{one.get_text()!r} touches {next_one.get_text()!r}")
    for legend in figure.legends:
        if legend.get_window_extent().overlaps(ax.get_window_extent()):
            faults.append("the legend is over the data")
    return faults


@pytest.fixture(scope="module")
def hostile():
    """Long names, large numbers, a long tail, thirteen classes, thirty categories."""
    frame, _, score = mixed(300)
    random = np.random.default_rng(5)
    frame["a name that is far too long for any picture that one could draw"] = random.normal(
        size=300
    )
    frame["price"] = random.lognormal(9, 3, 300)
    frame["job"] = random.choice([f"job {k} " + "of many" * (k % 3) for k in range(30)], 300)
    edges = np.quantile(score, np.linspace(0, 1, 14)[1:-1])
    labels = np.array([f"class number {k}" for k in range(13)])[np.digitize(score, edges)]
    pairs = [[[*frame][4], "price"], ["job", "member"], ["town", "job"], ["price", "age"]]
    quick = {**QUICK, "max_epochs": 1, "subsets": [*([name] for name in frame), *pairs]}
    return [
        InterpretableClassifier(**quick).fit(frame, labels).explain_global(),
        InterpretableRegressor(**quick).fit(frame, 1e7 * score).explain_global(),
    ]


def test_pictures_can_be_read_on_a_phone(hostile):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for whole, half in zip(hostile, (slice(None), slice(3)), strict=True):
        assert len(whole.shapes) == 7
        for name in [None, *[*whole.importance.index][half], *(p.names for p in whole.pairs[half])]:
            assert (name, hard_to_read(whole.plot(name))) == (name, [])
    ax = hostile[0].plot("price")
    ax.set_title("x" * 99)
    ax.tick_params(labelsize=5)
    ax.set_xticks([1.0, 1.0001], ["one", "two"])
    faults = " ".join(hard_to_read(ax))
    assert all(words in faults for words in ("is small", "is cut off", "'one' touches 'two'"))


@pytest.mark.parametrize(
    ("edges", "heavy", "filled", "points"),
    [
        ([0, 1], [], [0, 29], [0, 1]),
        ([0, 6], [1, 2, 3, 4, 5], [0, 5, 10, 15, 20, 25, 29], [0, 1, 2, 3, 4, 5, 6]),
        ([0, 1], [], [0, 12, 29], None),
        ([7], [], [0], [7]),
        ([], [], [], [0]),
    ],
)
def test_a_column_of_few_values_is_drawn_at_these_alone(edges, heavy, filled, points):
    edges, heavy = np.array(edges, dtype=float), np.array(heavy, dtype=float)
    spread = np.bincount(filled, minlength=30) / max(len(filled), 1)
    mean = np.zeros(max(len(edges) - 1, 0) + len(heavy))
    grid = _grid(NumericColumn("x", edges, heavy, mean, spread, 0.0), 64)
    assert np.isnan(grid[-1])
    assert len(grid) == 65 if points is None else grid[:-1].tolist() == points


def test_only_where_numbers_are_small_is_a_tail_long():
    x, many = np.linspace(0, 100, 50), np.full(30, 1 / 30)
    first = np.append(0.9, np.full(29, 0.1 / 29))
    for values, spread, scale in (
        (x, many, "linear"), (x, first, "symlog"), (x, first[::-1], "linear"),
        (-x[::-1], first[::-1], "symlog"), (x + 1000, first, "log"), (x - 50, first, "linear"),
    ):  # fmt: skip
        ax = curve(values, values**2, spread, "x", "y", None, [])
        assert ax.get_xscale() == scale
        ax.figure.draw_without_rendering()


def test_a_boolean_has_two_values_and_a_rare_category_is_counted(hostile):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    whole = hostile[1]
    assert whole.shapes["member"].x.tolist() == [0, 1]
    pair = next(pair for pair in whole.pairs if "member" in pair.names)
    assert ["0", "1"] in (pair.x, pair.y)
    names = texts(whole.plot("job"))
    assert names[-1].startswith("others (") or names[24].startswith("others (")
    shares = [int(re.search(r"\((\d+)%\)", name)[1]) for name in names if "%" in name]
    assert sum(shares) == pytest.approx(100, abs=13)  # 25 rounded numbers


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)
        for name, value in attributes:
            if tag == "img" and name == "src":
                self.pictures.append(value)
            if name in ("src", "href") and not value.startswith("data:"):
                self.outside.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_of_its_own(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    frame, labels, _ = mixed(100)
    frame = frame.rename(columns={"age": "<script>alert(1)</script>", "town": "a$b_{c"})
    model = InterpretableClassifier(**QUICK, subsets=[[name] for name in frame])
    whole = model.fit(frame, labels).explain_global()
    path = whole.report(tmp_path / "sub" / "report.html", title="Who & {what}")
    text = path.read_text("utf-8")
    page = Page(text)
    assert (page.open, page.outside) == ([], [])
    assert len(page.pictures) == 5
    assert all(picture.startswith("data:image/png;base64,iVBOR") for picture in page.pictures)
    assert "<script" not in text
    assert "Who &amp; {what}" in text
    shares = re.findall(r"</td><td>(\d+\.\d)%", text)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    part = InterpretableClassifier(**QUICK, subsets=[[frame.columns[0], "income"]])
    text = part.fit(frame, labels).explain_global().report(path).read_text("utf-8")
    assert "do not tell the groups apart" in text
    assert Page(text).pictures == []


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
#: Measures each frame once all have loaded.
WATCH = """<pre></pre><script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth, faults = [];
    if (page.documentElement.scrollWidth > width) faults.push("it scrolls sideways");
    for (const e of page.querySelectorAll("body *")) {
      const words = `${e.tagName} ${e.textContent.slice(0, 20)}`;
      if (e.getBoundingClientRect().right > width + 1) faults.push(`${words} is cut off`);
      if (parseFloat(frame.contentWindow.getComputedStyle(e).fontSize) < 9) faults.push("small");
    }
    for (const e of page.images) if (e.naturalWidth < e.width) faults.push("a picture is missing");
    return {width, pictures: page.images.length, faults};
  });
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>"""
BROKEN = """<img src="data:image/png;base64,x" width=50><p style="width: 900px">wide</p>
<script>console.error("told")</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")
def test_a_browser_shows_the_report_whole(hostile, tmp_path):
    """At the widths of a desk and of a phone, and beside it a page that is broken."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report = hostile[0].report(tmp_path / "report.html").read_text("utf-8")
    frames = [(1280, report), (390, report), (390, BROKEN)]
    page = WATCH + "".join(
        f'<iframe width={width} height=800 frameborder=0 srcdoc="{html.escape(text)}"></iframe>'
        for width, text in frames
    )
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --dump-dom".split()
    flags.append("--enable-logging=stderr")
    folder = f"--user-data-dir={tmp_path / 'browser'}"
    words = [BROWSER, *flags, folder, "--virtual-time-budget=9000", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    desk, phone, broken = json.loads(re.search(r"<pre>(.*?)</pre>", done.stdout)[1])
    pictures = 1 + len(hostile[0].shapes) + len(hostile[0].pairs)
    assert desk == {"width": 1280, "pictures": pictures, "faults": []}
    assert phone == {"width": 390, "pictures": pictures, "faults": []}
    assert {"it scrolls sideways", "P wide is cut off", "a picture is missing"} <= {
        *broken["faults"]
    }
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert ["told" in line for line in console] == [True], console
