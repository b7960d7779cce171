"""The report: what it shows is what the evaluation wrote, and nothing that a model wrote can act in it."""

import html.parser
import json
import re
from dataclasses import replace

import pytest
from markupsafe import Markup
from sample_run import evaluation, ppo_curve, run_records

from rlhf_pipeline.report.charts import Interval, axis, histogram, intervals, line, number
from rlhf_pipeline.report.curves import MAX_POINTS, figures, thinned
from rlhf_pipeline.report.page import comparisons, memory_rows, percent, render, settings_text, short, time_rows
from rlhf_pipeline.report.verdict import verdict

HOSTILE = (
    "</blockquote><script>document.title='owned'</script><img src=x onerror=alert(1)>\"' onmouseover=\"alert(2) "
    "</style></pre><iframe src=https://evil.example></iframe>{{ 7 * 7 }}\u2028</svg>"
)


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def page() -> str:
    return render("sample", run_records(), 1.79e9)


def test_hostile_generations_are_text_and_nothing_else(page: str) -> None:
    hostile = Page(render("sample", run_records(HOSTILE), 1.79e9))
    plain = Page(page)
    assert sum("owned" in text for text in hostile.text) > 20, "the hostile text must be shown"
    assert [tag for tag, _ in hostile.tags if tag in ("script", "img", "iframe", "style")] == ["style", "script"]
    # Nothing but figures may differ: no element more, no attribute more, no handler.
    assert [(tag, sorted(a)) for tag, a in hostile.tags] == [(tag, sorted(a)) for tag, a in plain.tags]
    assert not [name for _, attributes in hostile.tags for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in hostile.words


def test_a_hostile_run_name_is_text() -> None:
    tags = Page(render("<script>alert(1)</script>", run_records(), 1.79e9)).tags
    assert sum(tag == "script" for tag, _ in tags) == 1


def test_the_page_loads_nothing(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
    assert not re.findall(r"https?://|url\(|@import|//cdn", page)
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'")


def test_the_figures_shown_are_the_reports(page: str) -> None:
    report = run_records()[-1].report
    words = Page(page).words
    for name, compared in {"reward": report["reward"], **report["scorers"]}.items():
        sign = "+" if compared["rise"]["mean"] > 0 else ""
        assert f"{name} {sign}{short(compared['rise']['mean'])}" in words
        for side in ("reference", "policy"):
            assert f" {short(compared[side]['mean'])} " in words
        for bound in ("low", "high"):
            assert short(compared["rise"][bound]) in words
            assert percent(compared["win_rate"][bound]) in words
    assert f"KL paid {short(report['kl']['mean'])} nats" in words
    for figure in ("eos_rate", "distinct_1", "distinct_2"):
        assert percent(report[figure]["policy"]) in words
    for text in ("84.6 %", "79.9 % to 88.4 %", "3.32", "+0.007", "96.9 %", "3 min 51 s"):
        assert text in words


def test_marks_hold_every_point_of_a_curve() -> None:
    ppo = next(record for record in run_records() if record.stage == "ppo")
    drawn = {figure.title: Page(figure.svg) for figure in figures(ppo)}
    marks = json.loads(drawn["KL to the SFT policy"].tags[0][1]["data-marks"] or "")
    assert [mark[3] for mark in marks] == [f"nats a response {number(row['kl'] or 0)}" for row in ppo.curve]
    # null at the first rollout: left out, not drawn as 0
    assert len(json.loads(drawn["Explained variance of the critic"].tags[0][1]["data-marks"] or "")) == 59
    assert "KL coefficient" not in drawn  # it never moved
    assert "Peak GPU memory" not in drawn  # on a CPU


@pytest.mark.parametrize("missing", ["sft", "merge", "reward", "ppo", "evaluate", "import-model"])
def test_a_stage_that_is_missing_leaves_the_rest(missing: str) -> None:
    page = render("sample", [record for record in run_records() if record.stage != missing], 1.79e9)
    assert "Time and memory" in page
    assert (missing == "evaluate") == ("KL paid" not in page)


def test_records_without_reports_or_curves_still_render() -> None:
    bare = [replace(r, report={}, curve=[], generations=[], samples=[], metadata={}) for r in run_records()]
    assert "Time and memory" in render("bare", bare, 1.79e9)


def test_every_chart_has_a_title_a_summary_and_axis_labels(page: str) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert len(charts) > 20
    for chart in charts:
        assert re.search(r'aria-label="[^"]{20,}"', chart)
        assert re.search(r"<title>\w", chart)
        assert 'class="label"' in chart
        assert "nan" not in chart.lower().replace("finance", "")


def test_settings_are_the_spec_put_together_again() -> None:
    text = settings_text(run_records())
    assert "layers: top:8" in text  # the run's, although sft itself adapts all
    assert "dropout: 0.05" in text  # sft's, although PPO runs without
    assert "fingerprint" not in text
    assert text.index("model:") < text.index("data:") < text.index("sft:\n  steps") < text.index("ppo:\n")


def test_the_estimates_stand_beside_what_was_measured() -> None:
    gpu = {"memory": "24Gi", "count": 1}
    shape = {
        "hidden": 576,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_size": 64,
        "intermediate": 1536,
        "mlp_matrices": 3,
        "vocabulary": 49152,
        "positions": 8192,
        "tied": 1,
    }
    records = []
    for record in run_records():
        metadata = {**record.metadata, "config": {**record.metadata["config"], "gpu": gpu}}
        if record.stage == "import-model":
            metadata["metrics"] = shape
        elif record.stage in ("sft", "ppo"):
            metadata |= {"peakGpuBytes": 2 * 2**30, "device": "NVIDIA L4"}
        records.append(replace(record, metadata=metadata))
    rows = {row["stage"]: row for row in memory_rows(records)}
    assert set(rows) == {"sft", "ppo"}
    assert rows["ppo"]["measured"] == 2 * 2**30
    assert [name for name, _ in rows["ppo"]["phases"]] == ["rollout", "score", "train"]
    assert rows["ppo"]["estimated"] == max(size for _, size in rows["ppo"]["phases"]) > 0.1 * 2**30
    page = render("on a GPU", records, 1.79e9)
    assert "estimated and measured" in page
    assert "2.00 GiB" in page
    assert memory_rows(run_records()) == []  # on a CPU
    times = {row["what"]: row for row in time_rows(records)}
    assert set(times) == {"sft", *(f"ppo {phase}, an update" for phase in ("rollout", "score", "train"))}
    assert times["ppo rollout, an update"]["measured"] == 6.0
    assert times["ppo rollout, an update"]["estimated"] < 6.0  # the figures are a CPU's
    assert "Time: estimated and measured" in page
    assert time_rows(run_records()) == []


def rises(reward: tuple[float, float], **scorers: tuple[float, float]) -> dict[str, object]:
    def row(bounds: tuple[float, float]) -> dict[str, dict[str, float]]:
        return {"rise": {"mean": sum(bounds) / 2, "low": bounds[0], "high": bounds[1]}}

    return {"reward": row(reward), "scorers": {name: row(bounds) for name, bounds in scorers.items()}}


@pytest.mark.parametrize(
    ("report", "tone", "says"),
    [
        (rises((0.2, 0.6), vader=(0.1, 0.3), words=(0.05, 0.2)), "good", "vader and words"),
        (rises((0.2, 0.6), vader=(0.1, 0.3), words=(-0.1, 0.2)), "mixed", "vader confirms it, words does not"),
        (rises((0.2, 0.6), words=(-0.1, 0.2)), "mixed", "no scorer confirms it"),
        (rises((0.2, 0.6), vader=(-0.4, -0.1)), "bad", "vader fell: the policy exploits"),
        (rises((0.2, 0.6)), "mixed", "nothing independent"),
        (rises((-0.1, 0.6), vader=(0.1, 0.3)), "bad", "did not rise beyond chance"),
        (rises((-0.5, -0.1), vader=(0.1, 0.3)), "bad", "the reward fell"),
    ],
)
def test_the_verdict_says_no_more_than_the_intervals(report: dict[str, object], tone: str, says: str) -> None:
    found = verdict(report)
    assert found.tone == tone
    assert says in found.headline


def test_comparisons_say_how_good_a_fitted_scorer_is() -> None:
    report, _ = evaluation()
    about = {row["name"]: row["about"] for row in comparisons(report)}
    assert "85.3 % of 541" in about["classifier"]


def test_a_line_goes_through_its_points() -> None:
    svg = line([(1, 0.0), (2, 1.0), (3, 0.5)], "Reward", "rollout", "reward")
    path = re.search(r'<path class="line" d="M([^"]*)"', svg)
    assert path
    xs, ys = zip(*(map(float, point.split()) for point in path[1].split("L")), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[1] < ys[2] < ys[0]  # pixels grow downwards
    assert (ys[0] - ys[2]) == pytest.approx(ys[2] - ys[1])


def test_a_line_of_one_point_and_a_constant_line_can_be_drawn() -> None:
    assert "circle" in line([(1, 2.0)], "One", "step", "loss")
    assert "path" in line([(1, 0.0), (2, 0.0)], "Zero", "step", "loss")


def test_a_histogram_counts_every_value_once() -> None:
    before, after = [0.0, 0.1, 0.5, 1.0], [1.0, 1.0, 0.9]
    marks = json.loads(Page(histogram(before, after, ("SFT", "PPO"), "T", "x")).tags[0][1]["data-marks"] or "")
    counts = [re.fullmatch(r"SFT: (\d+), PPO: (\d+)", mark[3]) for mark in marks]
    assert [sum(int(found[side]) for found in counts if found) for side in (1, 2)] == [4, 3]


def test_chart_text_is_escaped() -> None:
    svg = intervals([Interval("<b>x</b>", 60, 50, 70)], "T <i>", "%", 50, axis([0, 100], 4))
    assert isinstance(svg, Markup)
    assert "<b>" not in svg
    assert "<i>" not in svg


def test_long_curves_are_averaged_and_keep_their_end() -> None:
    points = [(float(x), float(x % 2)) for x in range(1, 10_001)]
    short = thinned(points)
    assert len(short) <= MAX_POINTS
    assert short[-1][0] == 10_000
    assert all(0.4 < y < 0.6 for _, y in short)
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.18349, "0.183"),
        (-0.5, "−0.5"),
        (6.26, "6.26"),
        (1234.5, "1,234"),
        (1e-5, "1.00e−5"),
        (99.97, "100"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert number(value) == text


def test_axes_hold_their_values_between_round_ticks() -> None:
    found = axis([0.13, 0.87], 4)
    assert found.low <= 0.13
    assert found.high >= 0.87
    assert found.ticks[1] - found.ticks[0] == pytest.approx(0.2)
    assert axis([5.0, 5.0]).low < 5.0 < axis([5.0, 5.0]).high
    assert axis([3.0, 4.0], zero=True).low == 0


def test_the_sample_is_like_what_ppo_logs() -> None:
    assert {"reward", "score", "kl", "entropy", "explained_variance"} <= set(ppo_curve()[0])
