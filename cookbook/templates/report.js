// The reader: sets of problems, rows, pairs or answers; attempts side by side, coloured token by token.
{
  const source = document.getElementById("reader-data"), view = document.getElementById("reader-view");
  const el = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const COLOURS = {
    trained: "Trained tokens", logprob: "Logprobs", advantage: "Advantages", plain: "No colour",
  };
  const mix = (colour, share) => `color-mix(in srgb, var(${colour}) ${Math.round(100 * share)}%, transparent)`;

  const start = (sets) => {
    const state = { set: 0, item: 0, colour: "trained", find: "", only: "", order: "telling", shown: null };
    const list = el("ul", { class: "list" }), detail = el("div", { class: "detail" }), bar = el("div", { class: "bar" });
    view.append(bar, el("div", { class: "split" }, list, detail));

    const tokensOf = (part) => (typeof part[1] === "string" ? null : part[1]);
    const textOf = (part) => tokensOf(part)?.t.join("") ?? part[1];
    const parts = (item) => [...item.prompt, ...item.attempts.flatMap((attempt) => attempt.parts)];
    const found = (item) => {
      item.text ??= [item.title, ...parts(item).map(textOf), ...item.attempts.map((a) => a.head)].join("\n").toLowerCase();
      return item.text.includes(state.find.toLowerCase()) && (!state.only || item.flags.includes(state.only));
    };
    const orders = {
      telling: () => 0,
      best: (a, b) => (b.mean ?? -Infinity) - (a.mean ?? -Infinity),
      worst: (a, b) => (a.mean ?? Infinity) - (b.mean ?? Infinity),
    };
    const items = () => sets[state.set].items.filter(found).sort(orders[state.order]);
    const has = (set, key) => set.items.some((item) => item.attempts.some((a) => a.parts.some((p) => tokensOf(p)?.[key] !== undefined)));

    const select = (label, options, value, change) => {
      const box = el("select", { "aria-label": label, onchange: () => change(box.value) },
        ...options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
      return box;
    };

    const drawBar = () => {
      const set = sets[state.set];
      const flags = [...new Set(set.items.flatMap((item) => item.flags))];
      const modes = ["trained", "logprob", "advantage", "plain"].filter((mode) =>
        mode === "plain" ? has(set, "t") : has(set, { trained: "m", logprob: "l", advantage: "a" }[mode]));
      if (!modes.includes(state.colour)) state.colour = modes[0] ?? "plain";
      const finder = el("input", { type: "search", placeholder: "find text", "aria-label": "find text", value: state.find,
        oninput: () => { state.find = finder.value; state.item = 0; state.shown = null; drawList(); } });
      bar.replaceChildren(
        select("what to read", sets.map((each, i) => [String(i), each.label]), String(state.set), (value) => {
          Object.assign(state, { set: Number(value), item: 0, only: "", shown: null }); draw();
        }),
        ...(flags.length > 1 ? [select("which", [["", "all"], ...flags.map((flag) => [flag, flag])], state.only, (value) => {
          Object.assign(state, { only: value, item: 0, shown: null }); drawList();
        })] : []),
        ...(set.items.some((item) => item.mean != null) && set.items.length > 1 ? [select("order", [["telling", "most telling first"], ["best", "best first"], ["worst", "worst first"]],
          state.order, (value) => { Object.assign(state, { order: value, item: 0, shown: null }); drawList(); })] : []),
        finder, el("span", { class: "spring" }),
        ...(modes.length > 1 ? [select("colour of tokens", modes.map((mode) => [mode, COLOURS[mode]]), state.colour, (value) => {
          state.colour = value; drawBar(); drawDetail();
        })] : []),
        scale());
    };

    const scale = () => {
      const [from, to, back] = {
        trained: ["", "trained", mix("--c2", 0.3)],
        logprob: ["certain", "surprised", `linear-gradient(90deg, transparent, ${mix("--c1", 0.75)})`],
        advantage: ["−", "+", `linear-gradient(90deg, ${mix("--bad", 0.5)}, transparent, ${mix("--c0", 0.5)})`],
      }[state.colour] ?? ["", "", ""];
      if (!back) return "";
      const swatch = el("i", {});
      swatch.style.background = back;
      if (state.colour === "trained") swatch.style.width = "1.4rem";
      return el("span", { class: "scale" }, from, swatch, to);
    };

    const drawList = () => {
      const shown = items();
      list.replaceChildren(...shown.map((item, i) => el("li", {}, el("button", {
        type: "button", "aria-current": i === state.item, onclick: () => { state.item = i; state.shown = null; drawList(); },
      }, el("b", {}, item.title), el("span", {}, preview(item)), el("span", {}, item.note)))));
      drawDetail();
    };
    const preview = (item) => {
      const part = item.prompt[item.prompt.length - 1] ?? item.attempts[0].parts[0] ?? ["", ""], tokens = tokensOf(part);
      const trained = tokens?.t.filter((_, i) => tokens.m[i]).join("");  // what rows differ in
      return (trained || textOf(part)).trim().slice(0, 90);
    };

    const drawDetail = () => {
      const item = items()[state.item];
      if (!item) { detail.replaceChildren(el("p", { class: "empty" }, "Nothing here has that text.")); return; }
      const shown = state.shown ?? item.show;
      const values = item.attempts.map((attempt) => attempt.value).filter((value) => value !== null);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const largest = Math.max(1e-9, ...item.attempts.flatMap((a) => a.parts.map((p) => Math.abs(tokensOf(p)?.a ?? 0))));
      const chips = item.attempts.length <= item.show.length ? [] : [el("div", { class: "chips" }, ...item.attempts.map((attempt, i) => {
        const chip = el("button", { type: "button", class: `chip${shown.includes(i) ? " on" : ""}`, title: attempt.head,
          onclick: () => {
            const next = shown.includes(i) ? shown.filter((other) => other !== i) : [...shown, i].sort((a, b) => a - b);
            state.shown = next.length ? next : shown;
            drawDetail();
          } }, attempt.chip);
        if (attempt.value !== null && high > low) chip.style.background = mix(attempt.value === high ? "--c2" : attempt.value === low ? "--bad" : "--c5", 0.22);
        return chip;
      }))];
      const place = (i) => (item.names.length && i === 0 ? "best: " : item.names.length && i === item.attempts.length - 1 ? "worst: " : "");
      detail.replaceChildren(
        el("h4", {}, item.title), ...(item.note ? [el("p", { class: "note" }, item.note)] : []),
        ...(item.prompt.length ? [el("div", { class: "prompt" }, ...item.prompt.map((part) => said(part, largest)))] : []), ...chips,
        el("div", { class: "columns" }, ...shown.map((i) => {
          const attempt = item.attempts[i];
          const head = attempt.head || attempt.sub ? [el("p", {}, el("b", {}, place(i) + attempt.head), el("small", {}, attempt.sub))] : [];
          return el("div", { class: "attempt" }, ...head, ...attempt.parts.map((part) => said(part, largest)));
        })));
    };

    const said = (part, largest) => {
      const text = el("span", { class: "text" }), tokens = tokensOf(part);
      if (!tokens) text.append(part[1]);
      else tokens.t.forEach((piece, i) => piece && text.append(token(tokens, i, piece, largest)));
      return el("p", { class: "said" }, ...(part[0] ? [el("span", { class: "role" }, part[0])] : []), text);
    };

    const token = (tokens, i, piece, largest) => {
      const trained = Boolean(tokens.m[i]), logprob = tokens.l?.[i] ?? null;
      const node = el("span", { class: `t${trained ? "" : " untrained"}` }, piece);
      if (state.colour === "trained" && trained) node.style.background = mix("--c2", 0.2);
      if (state.colour === "logprob" && logprob !== null) node.style.background = mix("--c1", Math.min(0.75, -logprob / 6));
      if (state.colour === "advantage" && trained && tokens.a !== undefined)
        node.style.background = mix(tokens.a < 0 ? "--bad" : "--c0", 0.42 * Math.abs(tokens.a) / largest);
      const about = [];
      if (logprob !== null) about.push(`logprob ${logprob.toFixed(2)}, probability ${Math.exp(logprob).toPrecision(2)}`);
      if (tokens.a !== undefined && trained) about.push(`advantage ${tokens.a > 0 ? "+" : ""}${tokens.a}`);
      about.push(trained ? "trained" : "not trained");
      node.title = about.join("\n");
      return node;
    };

    const draw = () => { drawBar(); drawList(); };
    draw();
  };
  if (source && view) start(JSON.parse(source.textContent));
}
