"""Line charts: what is thinned keeps its extremes, what is no number shows, the markup is well-formed."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

from cookbook.charts import figure, line_chart, moving_average, short, thinned, ticks

NAN, INF = math.nan, math.inf


def drawn(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def told(chart: str) -> dict:
    return json.loads(drawn(chart).attrib["data-chart"])


def test_a_thinned_line_keeps_its_ends_and_every_spike() -> None:
    points = [(float(i), 0.01 * (i % 7)) for i in range(5000)]
    points[1234], points[4000] = (1234.0, 9.0), (4000.0, -9.0)
    points[77] = (77.0, NAN)
    kept = thinned(points, 600)
    assert len(kept) <= 604 and kept == sorted(kept, key=lambda point: point[0])
    assert {(1234.0, 9.0), (4000.0, -9.0), points[0], points[-1]} <= set(kept)
    assert [x for x, y in kept if math.isnan(y)] == [77.0]
    assert thinned(points[:600], 600) == points[:600]


def test_what_is_no_number_breaks_the_line_and_is_marked() -> None:
    chart = line_chart({"loss": [(0, 1.0), (1, 2.0), (2, NAN), (3, INF), (4, 1.0), (5, 2.0)]}, "loss")
    (line,) = [path.attrib["d"] for path in drawn(chart).iter("path") if path.attrib["class"].startswith("line")]
    (lost,) = [path.attrib["d"] for path in drawn(chart).iter("path") if path.attrib["class"].startswith("lost")]
    assert line.count("M") == 2 and line.count("L") == 2 and lost.count("M") == 2
    assert told(chart)["lines"][0]["y"] == [1, 2, "nan", "inf", 1, 2]


def test_names_and_titles_are_text_whatever_they_hold() -> None:
    name = "<script>alert(\"1\")</script> & 'x'"
    chart = line_chart({name: [(0, 1.0)], "b": [(0, 2.0)]}, name)
    keys = [key.text for key in drawn(chart).iter("button")]
    assert keys == [name, "b"] and drawn(chart).findtext("figcaption") == name
    assert told(chart)["lines"][0]["name"] == name and "<script" not in chart


def test_no_values_one_value_and_equal_values_have_a_chart_too() -> None:
    for points in ([], [(3.0, 1.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, NAN)]):
        chart = line_chart({"a": points}, "t")
        assert "nan" not in "".join(node.attrib.get("d", "") for node in drawn(chart).iter())
    assert "no values yet" in line_chart({"a": []}, "t")


def test_a_logarithmic_axis_has_powers_of_ten_and_no_place_for_zero() -> None:
    chart = line_chart({"a": [(i, 10.0**-i) for i in range(5)] + [(5, 0.0)]}, "t", log_y=True)
    labels = [text.text for text in drawn(chart).iter("text")]
    assert {"1", "0.1", "0.01", "0.001", "1e-4"} <= set(labels)
    assert told(chart)["lines"][0]["at"][-1] is None


def test_colours_follow_the_names_over_charts() -> None:
    colours = {f"run{i}": i for i in range(10)}
    lines = told(line_chart({"run9": [(0, 1.0)], "run1": [(0, 1.0)]}, "t", colours=colours))["lines"]
    assert [line["colour"] for line in lines] == ["s1 dashed", "s1"]


def test_a_moving_average_starts_at_the_line_and_follows_it() -> None:
    averaged = moving_average([(float(i), 5.0 if i < 200 else 1.0) for i in range(400)])
    assert averaged[0] == (0.0, 5.0) and abs(averaged[199][1] - 5) < 1e-9 and abs(averaged[-1][1] - 1) < 1e-6


def test_ticks_are_round_and_figures_short() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100] and ticks(0.11, 0.52) == [0.2, 0.3, 0.4, 0.5]
    assert [short(v) for v in (0, 12000, 2.5e6, 2e-4, 0.25, -1500)] == ["0", "12k", "2.5M", "2e-4", "0.25", "-1500"]
    assert [figure(v) for v in (0.35137, 1234567.0, 1.2e-4, 2048.5, NAN)] == [
        "0.3514",
        "1,234,567",
        "1.20e-04",
        "2,048.5",
        "nan",
    ]
