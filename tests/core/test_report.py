"""report.html: one file that needs no network, escapes what it shows, and shows every setting."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from results_made import GREEDY_POLICY, SHIFT_POLICY, VENDOR_POLICY, result, shown
from rich.console import Console
from tiny import tiny_heads, tiny_model
from tokenizers_made import byte_bpe

from autodeco.decoding.plot import Frame, Series, svg
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.problems import Problem
from autodeco.decoding.report import accuracy_entropy_plot, write_report
from autodeco.decoding.results import COLUMNS, EvaluationResult, table_row
from autodeco.decoding.settings import heads_policy
from autodeco.decoding.stage import evaluate_and_report
from autodeco.decoding.statistics import upper_hull
from autodeco.decoding.terminal import token_rgb
from autodeco.errors import EnvironmentProblem
from autodeco.files import atomic_write_json, read_json
from autodeco.training.logging import METRICS

TOKENIZER = byte_bpe()
HOSTILE = "<script>alert(1)</script><img src=\"http://evil.example/x.png\" onerror='x'>&amp;"
VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"
DIAL = (heads_policy(), heads_policy(0.85), heads_policy(1.0, 0.9), heads_policy(0.7, 0.8))
METRIC_ROWS: list[dict[str, Any]] = [
    {"kind": kind, "step": step, "loss": 3 / step, "nll": 2 / step, "outside_nucleus": 0.1}
    | {"temperature_mean": 0.9, "top_p_mean": 0.8, "temperature_std": 0.1, "top_p_std": 0.2}
    | ({"learning_rate": 1e-3 / step} if kind == "train" else {})
    for step in (1, 2, 3)
    for kind in ("train", "eval")
]
CURVES = ("Loss", "NLL before the cut", "Labels outside the nucleus", "Temperature and top-p")
CURVES += ("... and their spread", "Learning rate")


class Page(HTMLParser):
    """What a page is made of; every element that is opened must be closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [text for parent, text in self.texts if parent == tag]

    def text(self) -> str:
        return "".join(text for parent, text in self.texts if parent not in ("style", "title"))


def report(
    path: Path,
    evaluation: EvaluationResult | None = None,
    metrics: Any = METRIC_ROWS,
    job: Any = None,
) -> str:
    job = {"model": "tiny", "seed": 3, "out": Path("runs/x")} if job is None else job
    write_report(
        path / "report.html",
        job=job,
        metrics=metrics,
        evaluation=evaluation or result(dial=DIAL, shown=(shown([70, 71, 72]),)),
        tokenizer=TOKENIZER,
    )
    assert [p.name for p in path.iterdir()] == ["report.html"]
    return (path / "report.html").read_text(encoding="utf-8")


def drawings(html: str) -> list[ElementTree.Element]:
    """The plots, as XML."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_the_report_is_one_whole_page_that_parses(tmp_path: Path) -> None:
    html = report(tmp_path)
    page = Page(html)
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert page.named("meta") == [{"charset": "utf-8"}]
    assert page.inside("title")[:1] == page.inside("h1") == ["tiny"]
    assert len(drawings(html)) == 1 + len(CURVES)
    evaluation = result(dial=DIAL)
    for sentence in evaluation.verdict:
        assert sentence in page.inside("p")
    assert '"seed": 3' in page.inside("pre")[0] and "runs/x" in page.inside("pre")[0]


def assert_no_network(html: str) -> None:
    page = Page(html)
    loading = {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
    assert not loading & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "href", "xlink:href", "srcset", "action"), tag
            assert not name.startswith("on"), "a handler"
            assert name == "xmlns" or "//" not in str(value), (tag, name, value)
            assert "url(" not in str(value) and "javascript:" not in str(value)
    (style,) = page.inside("style")
    assert "@import" not in style and "url(" not in style and "//" not in style


def test_the_report_fetches_nothing_from_anywhere(tmp_path: Path) -> None:
    assert_no_network(report(tmp_path))


def test_hostile_text_is_shown_as_text_wherever_it_comes_from(tmp_path: Path) -> None:
    ids = TOKENIZER(HOSTILE)["input_ids"]
    wrong = shown(ids, correct=False, problem=HOSTILE, gt=HOSTILE)
    wrong = replace(wrong, setting=HOSTILE)
    plain = shown(ids, heads=False)
    policy = DecodingPolicy(HOSTILE, "heads")
    evaluation = result(dial=(heads_policy(), policy), shown=(wrong, plain))
    html = report(tmp_path, evaluation, job={"name": HOSTILE, HOSTILE: [HOSTILE]})
    assert_no_network(html)
    page = Page(html)
    assert page.inside("title")[:1] == page.inside("h1") == [HOSTILE]
    assert page.inside("h3") == [f"{HOSTILE}: wrong, the answer is {HOSTILE}", "heads: correct"]
    assert HOSTILE in page.inside("p") and HOSTILE in page.inside("td")
    assert "".join(page.inside("span")) == HOSTILE
    assert page.inside("div")[-1] == HOSTILE  # an answer without T and P
    assert HOSTILE.replace('"', '\\"') in page.inside("pre")[0]
    tips = [tip.text for tip in drawings(html)[0].iter(f"{SVG}title")]
    assert sum(HOSTILE in str(tip) for tip in tips) == 2  # on the line of either dial


def test_training_curves_are_there_when_there_are_metrics(tmp_path: Path) -> None:
    html = report(tmp_path)
    plots = drawings(html)[1:]
    assert "Training" in Page(html).inside("h2")
    titles = [next(iter(plot.iter(f"{SVG}text"))).text for plot in plots]
    assert tuple(titles) == CURVES
    for plot, title in zip(plots, titles, strict=True):
        names = {text.text for text in plot.iter(f"{SVG}text")}
        held_out = {name for name in names if str(name).endswith("held out")}
        assert len(list(plot.iter(f"{SVG}polyline"))) >= 1
        assert bool(held_out) == (title != "Learning rate")
    points = [tip.text for tip in plots[0].iter(f"{SVG}title")]
    assert points == ["step 1: 3", "step 2: 1.5", "step 3: 1"]  # of the held-out samples


def test_without_metrics_there_are_no_training_curves(tmp_path: Path) -> None:
    html = report(tmp_path, metrics=[])
    assert "Training" not in Page(html).inside("h2") and len(drawings(html)) == 1


def test_metrics_that_are_not_finite_or_missing_leave_gaps(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": 1, "loss": math.nan}, {"kind": "train", "step": 2}]
    rows += [{"kind": "train", "step": 3, "loss": 2.0}, {"kind": "eval", "step": 3, "nll": 1.0}]
    html = report(tmp_path, metrics=rows)
    loss, nll = drawings(html)[1:]
    (line,) = loss.iter(f"{SVG}polyline")
    assert len(line.attrib["points"].split()) == 1
    assert [tip.text for tip in nll.iter(f"{SVG}title")] == ["step 3: 1"]
    assert "nan" not in html.replace("tiny", "")


def marks(plot: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """Where the marks with a tip stand, by the setting's name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for mark in plot.iter():
        tip = mark.find(f"{SVG}title")
        if tip is None:
            continue
        if mark.tag == f"{SVG}circle":
            x, y = float(mark.attrib["cx"]), float(mark.attrib["cy"])
        else:
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", mark.attrib["d"])]
            x, y = sum(numbers[::2]) / 4, sum(numbers[1::2]) / 4
        found.setdefault(str(tip.text).split(": ")[0], []).append((x, y))
    return found


def test_every_setting_and_every_baseline_is_in_plot_and_table(tmp_path: Path) -> None:
    evaluation = result(dial=DIAL)
    html = report(tmp_path, evaluation)
    plot = drawings(html)[0]
    places = marks(plot)
    assert set(places) == {one.name for one in evaluation.settings}
    # Higher accuracy stands higher, more entropy further right, on one scale for all of them.
    spots = {one.name: (one.entropy, one.accuracy) for one in evaluation.settings}
    for a, (entropy, accuracy) in spots.items():
        for b, (other_entropy, other_accuracy) in spots.items():
            if entropy > other_entropy + 0.1:
                assert places[a][0][0] > places[b][0][0]
            if accuracy > other_accuracy + 0.001:
                assert places[a][0][1] < places[b][0][1]
    legend = {text.text for text in plot.iter(f"{SVG}text")}
    assert {"static upper hull", "static grid", "greedy", "vendor default", "mean shift"} <= legend
    page = Page(html)
    cells = page.inside("td")
    assert page.inside("th") == list(COLUMNS)
    for one in evaluation.settings:
        assert {cell for cell in table_row(one) if cell} <= set(cells), one.name
    assert any(cell.startswith("best static (") for cell in cells)
    for name in (VENDOR_POLICY.name, SHIFT_POLICY.name, GREEDY_POLICY.name):
        assert name in cells and name in places


def test_bug_heads_with_both_dials_turned_were_not_in_the_plot() -> None:
    both = heads_policy(0.7, 0.8)
    for dial in ((heads_policy(), both), (both,)):
        places = marks(ElementTree.fromstring(accuracy_entropy_plot(result(dial=dial))))
        assert both.name in places and len(places[both.name]) == 1


def test_the_hull_in_the_plot_is_that_of_the_static_settings() -> None:
    evaluation = result(dial=DIAL)
    plot = ElementTree.fromstring(accuracy_entropy_plot(evaluation))
    static = [s for s in evaluation.settings if s.role in ("greedy", "vendor", "static")]
    hull = upper_hull([s.entropy for s in static], [s.accuracy for s in static])  # type: ignore[arg-type]
    assert 2 < len(hull) < len(static)
    line = next(iter(plot.iter(f"{SVG}polyline"))).attrib["points"].split()
    corners = [tuple(map(float, point.split(","))) for point in line]
    places = marks(plot)
    assert corners == [places[static[n].name][0] for n in hull]


def test_a_sample_answer_has_a_span_for_each_token_with_its_t_and_p(tmp_path: Path) -> None:
    ids = TOKENIZER("abc 12\n<é")["input_ids"]
    html = report(tmp_path, result(shown=(shown(ids),)))
    spans = Page(html).named("span")
    assert len(spans) == len(ids) and "Sample answers" in Page(html).inside("h2")
    for n, span in enumerate(spans):
        t, p = 0.25 + 0.5 * n, 1 - 0.125 * n
        assert span["title"] == f"T {t:.3f}, P {p:.3f}"
        ink, ground = (f"rgb({r}, {g}, {b})" for r, g, b in token_rgb(t, p))
        assert span["style"] == f"color:{ink};background:{ground}"
    answer = html.split('<div class="answer">')[1].split("</div>")[0]
    assert ">abc</span>" in answer and ">\n</span>" in answer and ">&lt;</span>" in answer
    without = report(tmp_path, result(shown=(shown(ids, heads=False),)))
    assert not Page(without).named("span") and "abc 12\n&lt;" in without
    assert "Sample answers" not in report(tmp_path, result())


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    first = report(tmp_path)
    assert report(tmp_path) == first  # and it replaces the old one
    assert report(tmp_path, result(accuracy=0.8, dial=DIAL)) != first


def test_a_place_that_cannot_be_written_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "x").touch()
    with pytest.raises(EnvironmentProblem, match="cannot write") as caught:
        report(tmp_path)
    assert "report.html" in str(caught.value.where)


def test_the_stage_writes_result_and_report_with_the_training_curves(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    atomic_write_json(base / "generation_config.json", {"temperature": 0.6, "top_k": 5})
    out.mkdir()
    (out / METRICS).write_text('{"kind": "train", "step": 1, "loss": 2.5}\n')
    tokenizer, told = byte_bpe(), io.StringIO()
    outcome = evaluate_and_report(
        tiny_model(vocab_size=len(tokenizer)),
        tiny_heads(),
        tokenizer,
        [Problem("1+1=", "2", None, 1), Problem("2+2=", "4", None, 2)],
        out,
        base=base,
        eos_ids=[tokenizer.eos_token_id],
        job={"name": "small"},
        console=Console(file=told),
        max_new_tokens=3,
        resamples=20,
        grid=[],
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "answers.jsonl",
        "evaluation.json",
        METRICS,
        "report.html",
    ]
    assert read_json(out / "evaluation.json") == outcome.results
    roles = [one["role"] for one in outcome.results["settings"]]
    assert roles == ["greedy", "vendor", "mean shift", *["heads"] * 6]
    html = outcome.report.read_text()
    assert_no_network(html)
    assert "Training" in Page(html).inside("h2") and len(drawings(html)) == 2
    assert len(Page(html).named("span")) > 2 and all(s in html for s in ("1+1=", "small"))
    assert outcome.verdict == " ".join(outcome.results["verdict"])
    assert "2 problems, asked as text" in told.getvalue()


def test_bug_without_heads_the_report_said_hover_though_nothing_can_be_hovered(
    tmp_path: Path,
) -> None:
    for heads in (True, False):
        page = Page(report(tmp_path, result(shown=(shown([70, 71], heads=heads),))))
        assert bool(page.named("span")) == heads
        assert any("Hover for the numbers" in text for text in page.inside("p")) == heads


def test_bug_line_breaks_of_a_problem_were_lost(tmp_path: Path) -> None:
    html = report(tmp_path, result(shown=(shown([70], problem="one\n  two"),)))
    assert '<p class="problem">one\n  two</p>' in html
    assert ".problem { white-space: pre-wrap" in html


POINTS = {
    "none": [],
    "one": [(3.0, 0.5)],
    "one at the origin": [(0.0, 0.0)],
    "equal": [(3.0, 0.5)] * 4,
    "equal x": [(3.0, 0.1 * n) for n in range(5)],
    "equal y": [(float(n), -2.0) for n in range(5)],
    "wide": [(-1e6, 1e-9), (1e6, 2e-9), (0.0, 1.5e-9)],
    "close": [(1.0, 1.0), (1.0 + 1e-12, 1.0)],
    "not finite": [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 0.0)],
}


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("frame", [None, Frame(400, 200, 40, 120, 20, 30)])
def test_points_lie_inside_the_frame_however_few_or_equal(name: str, frame: Frame | None) -> None:
    points = [(x, y, f"p{n}") for n, (x, y) in enumerate(POINTS[name])]
    series = [Series(k, points, "#123456", line=k == "dot", marker=k) for k in ("dot", "cross")]
    plot = ElementTree.fromstring(svg(series, "<title>", "x & x", 'y "y"', frame=frame))
    frame = frame or Frame()
    assert plot.attrib["viewBox"] == f"0 0 {frame.width} {frame.height}"
    places = marks(plot)
    finite = [note for x, y, note in points if math.isfinite(x) and math.isfinite(y)]
    assert sorted(places) == sorted(finite) and all(len(p) == 2 for p in places.values())
    for x, y in (place for both in places.values() for place in both):
        assert frame.left <= x <= frame.width - frame.right
        assert frame.top <= y <= frame.height - frame.bottom
    for line in plot.iter(f"{SVG}line"):
        ends = [float(line.attrib[end]) for end in ("x1", "x2", "y1", "y2")]
        assert 0 <= min(ends[:2]) <= max(ends[:2]) <= frame.width
        assert 0 <= min(ends[2:]) <= max(ends[2:]) <= frame.height
    words = [text.text for text in plot.iter(f"{SVG}text")]
    assert {"<title>", "x & x", 'y "y"', "dot", "cross"} <= set(words)
    assert len(words) <= 5 + 2 * 10, "at most about nine ticks an axis"


def test_points_below_the_floor_are_left_out_and_the_scale_is_true() -> None:
    points = [(float(n), 10.0 * n, f"p{n}") for n in range(5)]
    plot = ElementTree.fromstring(svg([Series("s", points, "#000000")], "t", "x", "y", floor=10.0))
    places = {name: place[0] for name, place in marks(plot).items()}
    assert sorted(places) == ["p1", "p2", "p3", "p4"]
    steps = [places[f"p{n + 1}"][0] - places[f"p{n}"][0] for n in (1, 2, 3)]
    rises = [places[f"p{n}"][1] - places[f"p{n + 1}"][1] for n in (1, 2, 3)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.25) and steps[0] > 100
    assert rises == pytest.approx([rises[0]] * 3, abs=0.25) and rises[0] > 100
    ticks = {t.text: float(t.attrib["x"]) for t in plot.iter(f"{SVG}text") if t.text == "2"}
    assert ticks["2"] == pytest.approx(places["p2"][0], abs=0.11)
