"use strict";
// Values under the pointer, and names in a legend that hide their lines.
{
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const shown = (value) => {
    if (typeof value === "string") return value === "nan" ? "NaN" : value;
    const size = Math.abs(value);
    if (Number.isInteger(value) || size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 1 });
    return size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const nearest = (sorted, wanted) => {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < wanted) low = middle; else high = middle;
    }
    return Math.abs(sorted[low] - wanted) <= Math.abs(sorted[high] - wanted) ? low : high;
  };

  const watch = (figure) => {
    const svg = figure.querySelector("svg");
    let chart = null, tip = null, marks = null;
    const leave = () => { tip?.remove(); marks?.remove(); tip = marks = null; };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      chart ??= JSON.parse(figure.dataset.chart);
      leave();
      const box = svg.getBoundingClientRect(), scale = chart.width / box.width;
      const share = ((event.clientX - box.left) * scale - chart.left) / (chart.right - chart.left);
      const wanted = chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]);
      const hidden = (line) => line.colour.split(" ")[0] in off && off[line.colour.split(" ")[0]].has(line.name);
      const lines = chart.lines.filter((line) => !hidden(line));
      if (!lines.length) return;
      const places = lines.map((line) => nearest(line.x, wanted));
      const closest = lines.map((line, i) => line.x[places[i]]).reduce((a, b) => (Math.abs(a - wanted) <= Math.abs(b - wanted) ? a : b));
      const across = (x) => chart.left + ((x - chart.x[0]) / (chart.x[1] - chart.x[0])) * (chart.right - chart.left);
      marks = make("g", {});
      marks.append(make("line", { class: "cursor", x1: across(closest), x2: across(closest), y1: chart.top, y2: chart.bottom }));
      tip = document.createElement("div");
      tip.className = "tip";
      tip.append(`${figure.dataset.x ?? "step"} ${shown(closest)}`);
      lines.forEach((line, i) => {
        const place = places[i], reach = (chart.x[1] - chart.x[0]) / 40;
        if (Math.abs(line.x[place] - closest) > reach) return;
        if (line.at[place] !== null) marks.append(make("circle", { class: `spot ${line.colour}`, cx: across(line.x[place]), cy: line.at[place], r: 4 }));
        const row = document.createElement("div"), dot = document.createElement("i");
        dot.className = line.colour;
        row.append(dot, lines.length > 1 ? `${line.name}  ` : "", shown(line.y[place]));
        tip.append(row);
      });
      svg.append(marks);
      figure.append(tip);
      const room = figure.getBoundingClientRect();
      const left = event.clientX - room.left + 14, over = left + tip.offsetWidth > room.width - 4;
      tip.style.left = `${Math.max(4, over ? left - tip.offsetWidth - 28 : left)}px`;
      tip.style.top = `${event.clientY - room.top + 12}px`;
    });
  };

  const off = {};  // colour -> names hidden
  document.querySelectorAll(".chart").forEach(watch);
  document.addEventListener("click", (event) => {
    const key = event.target.closest?.(".key");
    if (!key) return;
    const colour = [...key.classList].find((name) => /^s\d$/.test(name)), dashed = key.classList.contains("dashed");
    const hide = !key.classList.contains("off"), name = key.textContent;
    off[colour] ??= new Set();
    if (hide) off[colour].add(name); else off[colour].delete(name);
    document.querySelectorAll(`.key.${colour}`).forEach((other) => { if (other.textContent === name) other.classList.toggle("off", hide); });
    document.querySelectorAll(`.chart svg .${colour}`).forEach((part) => {
      if (part.classList.contains("dashed") === dashed) part.classList.toggle("gone", hide);
    });
  });
}
