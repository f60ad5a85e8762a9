"""Curves of one run as an SVG file for a page of docs/.

    uv run python -m bench.curve RUN docs/pictures/sft.svg train/nll eval/held_out/nll

A metric may be given as NAME=LABEL. The drawing is that of report.html, with its own colours for light and dark pages.
"""

from __future__ import annotations

import argparse
import re
from html import escape
from pathlib import Path

from cookbook.charts import HEIGHT, LEFT, WIDTH, Points, line_chart
from cookbook.curves import points_of
from cookbook.run_reader import read_run

STYLE = """
svg { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; background: #ffffff; color-scheme: light dark; }
.axes line { stroke: #ecedf0; } .axes .base { stroke: #c9ccd2; } text { fill: #5d636e; }
.line { fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.dot, .name { fill: currentColor; } .pale { opacity: .28; } .lost { fill: none; stroke: #b3261e; }
.s0 { color: #2458d3; } .s1 { color: #d9620b; } .s2 { color: #0d8a6a; } .s3 { color: #b02a7c; }
@media (prefers-color-scheme: dark) {
  svg { background: #1c1f24; } .axes line { stroke: #272b31; } .axes .base { stroke: #4a5059; } text { fill: #a6adb8; }
  .s0 { color: #7ea6ff; } .s1 { color: #ff9d57; } .s2 { color: #4fcfa9; } .s3 { color: #f083bf; }
}
"""
LEGEND = 26  # units above the chart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's name or directory")
    parser.add_argument("to", type=Path)
    parser.add_argument("metrics", nargs="+")
    args = parser.parse_args()
    rows = read_run(args.run).metrics()
    series: dict[str, Points] = {}
    for metric in args.metrics:
        name, _, label = metric.partition("=")
        series[label or name] = points_of(rows, name)
        if not series[label or name]:
            parser.error(f"{args.run} has no metric {name}")
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(drawing(series), encoding="utf-8")


def drawing(series: dict[str, Points]) -> str:
    inner = re.search(r"<svg[^>]*>(.*)</svg>", line_chart(series, "", legend=False), re.DOTALL)
    assert inner is not None
    names, x = [], LEFT
    for index, name in enumerate(series):
        stroke = f'<path class="line s{index}" d="M{x:g} -12h16"/>'
        names.append(f'{stroke}<text class="name s{index}" x="{x + 21:g}" y="-8">{escape(name)}</text>')
        x += 21 + 6.6 * len(name) + 18
    box = f"0 {-LEGEND} {WIDTH:g} {HEIGHT + LEGEND:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{1.5 * WIDTH:g}" role="img">\n'
        f"<style>{STYLE}</style>\n{''.join(names)}{inner[1]}\n</svg>\n"
    )


if __name__ == "__main__":
    main()
