"use strict";
// Everything from the data becomes text through `textContent` or an attribute of our own making, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const summary = data.summary || {};
  const run = data.run || {};
  const page = document.getElementById("page");
  const SVG = "http://www.w3.org/2000/svg";
  const color = (index) => `var(--s${index % 6})`;
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const text = (number) => data.texts[number];

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    return fill(node, attributes, children);
  }
  function svg(tag, attributes, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    for (const child of children.flat()) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  }

  function compact(value) {
    if (!isNumber(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(size < 1e-3 ? 1 : 2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(size >= 1 ? 4 : 3)));
  }
  const fixed = (value) => (isNumber(value) ? value.toFixed(3) : "–");
  const signed = (value) => (isNumber(value) ? (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(3) : "–");
  const range = (one, show) => (one && isNumber(one.low) ? `95 % interval ${show(one.low)} to ${show(one.high)}` : "");
  function duration(ms) {
    if (!isNumber(ms)) return "–";
    if (ms < 1000) return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
    if (ms < 60000) return `${(ms / 1000).toFixed(2)} s`;
    const seconds = Math.round(ms / 1000);
    return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  }
  function parsed(words) {
    try { return words.startsWith("{") ? JSON.parse(words) : words; } catch { return words; }
  }
  function plain(value) {
    return typeof value === "string" ? value : JSON.stringify(value, null, 1);
  }

  // ---- headline ------------------------------------------------------------------------------------------------

  const evaluations = summary.evaluations || {};
  const before = evaluations.before || {};
  const after = evaluations.after || {};
  const gain = evaluations.gain || {};

  function tile(label, value, detail) {
    return el("div", { class: "tile" },
      el("div", { class: "label" }, label), el("div", { class: "value" }, value),
      detail ? el("div", { class: "fine" }, detail) : null);
  }
  function header() {
    const facts = [
      run.agent ? `agent ${run.agent}` : null,
      isNumber(summary.steps) ? `${summary.steps} steps` : null,
      `report written ${data.written}`,
    ].filter(Boolean);
    page.append(el("header", null, el("h1", null, `Run ${data.title}`), el("p", null, facts.join(" · "))));
    const tiles = el("div", { class: "tiles" });
    const name = "reward" in after ? "reward" : Object.keys(after)[0];
    if (name) {
      tiles.append(
        tile("Held-out before", fixed((before[name] || {}).mean), range(before[name], fixed)),
        tile("Held-out after", fixed(after[name].mean), range(after[name], fixed)));
      if (gain[name]) tiles.append(tile("Gain, paired", signed(gain[name].mean), range(gain[name], signed)));
    }
    const failed = Object.values(summary.failures || {}).reduce((sum, one) => sum + one, 0);
    if (isNumber(summary.rollouts)) {
      tiles.append(tile("Rollouts", compact(summary.rollouts), `${failed} failed, ${summary.retries || 0} tried again`));
    }
    const since = isNumber(summary.resumed_after) ? `, since the resume after step ${summary.resumed_after}` : "";
    if (isNumber(summary.model_calls)) {
      const tokens = isNumber(summary.tokens_sampled) ? `${compact(summary.tokens_sampled)} tokens sampled${since}` : "";
      tiles.append(tile("Model calls", compact(summary.model_calls), tokens));
    }
    if (isNumber(summary.train_seconds)) {
      const cpu = isNumber(summary.train_cpu_seconds) ? `${compact(summary.train_cpu_seconds)} CPU seconds${since}` : "";
      tiles.append(tile("Training time", duration(summary.train_seconds * 1000), cpu));
    }
    if (summary.peak_memory_bytes) {
      tiles.append(tile("Peak memory", `${(summary.peak_memory_bytes / 2 ** 30).toFixed(2)} GiB`, "all processes"));
    }
    if (tiles.childElementCount) page.append(tiles);
    else page.append(el("p", { class: "note" }, "This run has not ended; its summary appears when it does."));
  }

  function interval(one, show) {
    if (!one || !isNumber(one.mean)) return "–";
    const bounds = isNumber(one.low) ? el("span", { class: "interval" }, ` [${show(one.low)}, ${show(one.high)}]`) : null;
    return el("span", null, show(one.mean), bounds);
  }
  function intervalPlot(name) {
    const values = [before[name], after[name]].filter((one) => one && isNumber(one.mean));
    const all = Object.values(before).concat(Object.values(after));
    const low = Math.min(0, ...all.map((one) => (isNumber(one.low) ? one.low : one.mean)));
    const high = Math.max(1, ...all.map((one) => (isNumber(one.high) ? one.high : one.mean)));
    const x = (value) => 4 + (192 * (value - low)) / (high - low || 1);
    const shapes = [svg("line", { x1: 4, x2: 196, y1: 15, y2: 15, stroke: "var(--grid)" })];
    values.forEach((one, index) => {
      const paint = one === before[name] ? "var(--soft)" : "var(--s0)";
      const y = 9 + 12 * (values.length > 1 ? index : 0.5);
      if (isNumber(one.low)) shapes.push(svg("line", { x1: x(one.low), x2: x(one.high), y1: y, y2: y, stroke: paint, "stroke-width": 2 }));
      shapes.push(svg("circle", { cx: x(one.mean), cy: y, r: 4, fill: paint }));
    });
    return svg("svg", { width: 200, height: 30, viewBox: "0 0 200 30", "aria-hidden": "true" }, shapes);
  }
  function heldOut() {
    const names = [...new Set(Object.keys(before).concat(Object.keys(after)))].sort((a, b) => (b === "reward") - (a === "reward"));
    if (!names.length) return;
    section("Held-out tasks", "Mean over tasks with its 95 % bootstrap interval; the gain compares the same tasks before and after. Grey is before, blue after.");
    page.append(table(["reward", "", "before", "after", "gain", "tasks"], names.map((name) => [
      name, intervalPlot(name), interval(before[name], fixed), interval(after[name], fixed),
      interval(gain[name], signed), compact((after[name] || before[name]).n),
    ]), [2, 3, 4, 5]));
  }

  function section(title, note) {
    page.append(el("h2", null, title));
    if (note) page.append(el("p", { class: "note" }, note));
  }
  function table(head, rows, numeric) {
    const kind = (index) => (numeric.includes(index) ? { class: "number" } : null);
    return el("div", { class: "scroll" }, el("table", null,
      el("thead", null, el("tr", null, head.map((cell, index) => el("th", kind(index), cell)))),
      el("tbody", null, rows.map((row) => el("tr", null, row.map((cell, index) => el("td", kind(index), cell)))))));
  }

  // ---- curves --------------------------------------------------------------------------------------------------

  function stepFor(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].find((one) => one * power >= raw * 0.999) * power;
  }
  function ticks(low, high, step) {
    const found = [];
    for (let index = Math.ceil(low / step - 1e-6); index * step <= high + step * 1e-6; index += 1) found.push(index * step);
    return found;
  }
  function chart(spec, isFirst) {
    const width = isFirst ? 1100 : 400;
    const height = isFirst ? 300 : 210;
    const left = isFirst ? 58 : 66, right = 14, top = 12, bottom = 38;
    const series = spec.series.map((one, index) => ({ ...one, index, points: one.points.filter((point) => isNumber(point[1])) }))
      .filter((one) => one.points.length);
    if (!series.length) return null;
    const xs = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
    const ys = series.flatMap((one) => one.points.flatMap((point) => point.slice(1).filter(isNumber)));
    let low = Math.min(...ys), high = Math.max(...ys);
    if (low >= 0 && low < (high - low) * 1.5) low = 0;
    if (low === 0 && high === 0) high = 1;
    if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    const rise = stepFor(low, high, isFirst ? 6 : 5);
    low = Math.floor(low / rise + 1e-6) * rise;
    high = Math.ceil(high / rise - 1e-6) * rise;
    const marks = ticks(low, high, rise);
    const x0 = xs[0], x1 = xs[xs.length - 1];
    const x = (step) => (x0 === x1 ? (left + width - right) / 2 : left + ((step - x0) / (x1 - x0)) * (width - left - right));
    const y = (value) => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
      "aria-label": `${spec.title}: ${series.map((one) => `${one.name} from ${compact(one.points[0][1])} to ${compact(one.points[one.points.length - 1][1])}`).join("; ")}` });
    for (const mark of marks) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
        svg("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, compact(mark)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    for (const mark of ticks(x0, x1, Math.max(1, stepFor(x0, x1, isFirst ? 12 : 6)))) {
      picture.append(svg("text", { x: x(mark), y: height - bottom + 15, "text-anchor": "middle" }, String(mark)));
    }
    picture.append(svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, "step"),
      svg("text", { x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(top + height - bottom) / 2})` }, spec.unit || "value"));
    for (const one of series) {
      const paint = color(one.index);
      const isSparse = one.points.length <= 12;
      if (one.points.length > 1) {
        picture.append(svg("polyline", { points: one.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" "),
          fill: "none", stroke: paint, "stroke-width": 1.8, "stroke-linejoin": "round" }));
      }
      for (const point of one.points) {
        if (isNumber(point[2])) {
          picture.append(svg("line", { x1: x(point[0]), x2: x(point[0]), y1: y(point[2]), y2: y(point[3]), stroke: paint, "stroke-width": 1.6 }));
        }
        if (isSparse) picture.append(svg("circle", { cx: x(point[0]), cy: y(point[1]), r: 3, fill: paint }));
      }
    }
    const box = el("div", { class: `chart${isFirst ? " first" : ""}`, title: null }, el("h3", null, spec.title), legend(series));
    box.append(picture);
    hover(box, picture, series, { xs, x, width, top, bottom: height - bottom });
    return box;
  }
  function legend(series) {
    return el("div", { class: "legend" }, series.map((one) => {
      const swatch = el("i");
      swatch.style.background = color(one.index);
      return el("span", { title: one.meaning }, swatch, one.name);
    }));
  }
  function hover(box, picture, series, place) {
    const cursor = svg("line", { class: "cursor", y1: place.top, y2: place.bottom, visibility: "hidden" });
    const tip = el("div", { class: "tip", hidden: "" });
    picture.append(cursor);
    box.append(tip);
    let at = 0;
    const hide = () => { cursor.setAttribute("visibility", "hidden"); tip.hidden = true; };
    const show = (index) => {
      at = Math.max(0, Math.min(place.xs.length - 1, index));
      const step = place.xs[at];
      cursor.setAttribute("x1", place.x(step));
      cursor.setAttribute("x2", place.x(step));
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(el("b", null, `step ${step}`), ...series.flatMap((one) => {
        const point = one.points.find((candidate) => candidate[0] === step);
        if (!point) return [];
        const bounds = isNumber(point[2]) ? ` [${compact(point[2])}, ${compact(point[3])}]` : "";
        const swatch = el("span", null, one.name);
        swatch.style.color = color(one.index);
        return [el("div", null, swatch, el("span", null, compact(point[1]) + bounds))];
      }));
      tip.hidden = false;
      const scale = picture.clientWidth / place.width;
      const across = picture.offsetLeft + place.x(step) * scale || place.x(step) * scale + 14;
      const room = box.clientWidth - tip.offsetWidth - 6;
      tip.style.left = `${Math.max(6, Math.min(room, across + 12 > room ? across - tip.offsetWidth - 12 : across + 12))}px`;
      tip.style.top = `${box.clientHeight - picture.clientHeight + 6}px`;
    };
    picture.addEventListener("pointermove", (event) => {
      const bounds = picture.getBoundingClientRect();
      const where = ((event.clientX - bounds.left) / bounds.width) * place.width;
      let best = 0;
      place.xs.forEach((step, index) => { if (Math.abs(place.x(step) - where) < Math.abs(place.x(place.xs[best]) - where)) best = index; });
      show(best);
    });
    picture.addEventListener("pointerleave", hide);
    picture.addEventListener("blur", hide);
    picture.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") show(at + 1);
      else if (event.key === "ArrowLeft") show(at - 1);
      else return;
      event.preventDefault();
    });
  }
  function curves() {
    if (!data.charts.length) return;
    section("Curves", "By training step. Point at a chart, or focus it and use the arrow keys, for the values; bars on points are 95 % intervals.");
    const main = data.charts.filter((one) => !one.is_extra);
    const rest = data.charts.filter((one) => one.is_extra);
    page.append(el("div", { class: "charts" }, main.map((one, index) => chart(one, index === 0 && page.clientWidth > 700))));
    if (rest.length) {
      page.append(el("details", { class: "more" }, el("summary", null, `${rest.length} more ${rest.length === 1 ? "metric" : "metrics"}`),
        el("div", { class: "charts" }, rest.map((one) => chart(one, false)))));
    }
  }

  // ---- tables --------------------------------------------------------------------------------------------------

  function roles() {
    const found = Object.entries(summary.roles || {});
    if (!found.length) return;
    section("By role", "In the last held-out evaluation. A role in no policy keeps its own endpoint; its calls are recorded without token ids.");
    page.append(table(["role", "policy", "calls", "calls a rollout", "mean reward when it spoke"], found.map(([role, one]) => [
      role, one.policy || "none: its own endpoint", compact(one.calls), isNumber(one.calls_per_rollout) ? one.calls_per_rollout.toFixed(2) : "–",
      fixed(one.reward_when_spoken)]), [2, 3, 4]));
  }
  function taskText(task) {
    if (task && typeof task === "object") {
      for (const name of ["question", "prompt", "input", "task", "query", "text", "instruction", "problem"]) {
        if (typeof task[name] === "string" && task[name]) return task[name];
      }
    }
    return plain(task);
  }
  function differing(first, second) {
    const isMap = (one) => one && typeof one === "object" && !Array.isArray(one);
    if (!isMap(first) || !isMap(second)) return [first, second];
    const names = [...new Set(Object.keys(first).concat(Object.keys(second)))]
      .filter((name) => JSON.stringify(first[name]) !== JSON.stringify(second[name]));
    const cut = (one) => (names.length === 1 ? one[names[0]] : Object.fromEntries(names.map((name) => [name, one[name]])));
    return names.length ? [cut(first), cut(second)] : [first, second];
  }
  function link(facts) {
    const id = (facts || {}).rollout;
    return data.rollouts.some((one) => one.id === id) ? el("a", { href: `#${encodeURIComponent(id)}` }, id) : null;
  }
  function labelled(output) {
    if (typeof output !== "object" || output === null || Array.isArray(output)) return [["", plain(output)]];
    const names = new Map();
    for (const [name, value] of Object.entries(output)) names.set(plain(value), [...(names.get(plain(value)) || []), name]);
    return [...names].map(([value, same]) => [same.join(", "), value]);
  }
  function examples() {
    const found = summary.examples || [];
    if (!found.length) return;
    section("Examples", "Held-out tasks whose reward changed most.");
    page.append(el("div", { class: "examples" }, found.map((one) => {
      const [first, second] = differing((one.before || {}).output, (one.after || {}).output);
      const side = (label, facts, output) => el("div", null, el("h3", null, `${label}: reward ${compact((facts || {}).reward)} `, link(facts)),
        output === null || output === undefined ? null : labelled(output).map(([name, value]) =>
          el("div", null, name ? el("div", { class: "speaker" }, name) : null, el("pre", null, value))));
      return el("div", { class: "example" }, el("p", null, taskText(one.task)),
        el("div", { class: "sides" }, side("Before", one.before, first), side("After", one.after, second)));
    })));
  }
  function failures() {
    const found = Object.entries(summary.failures || {}).sort((a, b) => b[1] - a[1]);
    if (!found.length) return;
    section("Failed rollouts, by type");
    page.append(table(["type", "rollouts"], found.map(([name, count]) => [name, compact(count)]), [1]));
  }
  function configuration() {
    const list = el("dl");
    const add = (name, value) => {
      if (value === null || value === undefined || value === "") return;
      list.append(el("dt", null, name), el("dd", null, typeof value === "object" ? el("code", null, JSON.stringify(value)) : String(value)));
    };
    const shown = { ...run };
    for (const name of ["agent", "algorithm", "base_model", "base_sha256", "seed", "total_steps"]) {
      add(name.replaceAll("_", " "), shown[name]);
      delete shown[name];
    }
    for (const [name, policy] of Object.entries(shown.policies || {})) add(`policy ${name}`, policy);
    delete shown.policies;
    const versions = shown.versions || summary.versions;
    delete shown.versions;
    for (const [name, value] of Object.entries(shown)) add(name.replaceAll("_", " "), value);
    for (const [name, value] of Object.entries(versions || {})) add(name, value);
    if (!list.childElementCount) return;
    section("Configuration");
    page.append(list);
  }

  // ---- rollouts ------------------------------------------------------------------------------------------------

  const BATCH = 200;
  function browser() {
    const all = data.rollouts;
    section("Rollouts", `${all.length.toLocaleString("en")} of ${data.rollouts_in_all.toLocaleString("en")} rollouts are in this file, which is kept near 5 MB: ` +
      "the last evaluation, the best, the worst and others of each step, and the first evaluation, as far as they fit. Long texts are cut. " +
      "“leyden rollouts” and “leyden show” show all of them whole.");
    if (!all.length) return;
    const state = { mode: "", step: "", state: "", reward: "", words: "", shown: BATCH };
    const body = el("tbody");
    const foot = el("div", { class: "foot" });
    const detail = el("div", { class: "detail", tabindex: 0, "aria-label": "chosen rollout" });
    const choice = (label, key, values) => {
      const box = el("select", { onchange: () => { state[key] = box.value; state.shown = BATCH; draw(); } },
        el("option", { value: "" }, "all"), values.map((value) => el("option", { value }, String(value))));
      return el("label", null, label, box);
    };
    const distinct = (pick) => [...new Set(all.map(pick))];
    const search = el("input", { type: "search", placeholder: "id or words of the task" });
    search.addEventListener("input", () => { state.words = search.value.toLowerCase(); state.shown = BATCH; draw(); });
    const filters = el("div", { class: "filters" },
      choice("mode", "mode", distinct((one) => one.mode)), choice("step", "step", distinct((one) => one.step).sort((a, b) => a - b)),
      choice("state", "state", distinct((one) => one.state)),
      choice("reward", "reward", distinct((one) => (isNumber(one.reward) ? compact(one.reward) : "none")).sort().slice(0, 60)),
      el("label", null, "search", search));
    page.append(filters);
    const fits = (one) => (!state.mode || one.mode === state.mode) && (state.step === "" || String(one.step) === state.step) &&
      (!state.state || one.state === state.state) &&
      (!state.reward || (isNumber(one.reward) ? compact(one.reward) : "none") === state.reward) &&
      (!state.words || `${one.id} ${text(one.task)}`.toLowerCase().includes(state.words));
    let chosen = null;
    const open = (one) => {
      chosen = one;
      for (const row of body.children) row.classList.toggle("chosen", row.dataset.id === one.id);
      showRollout(detail, one);
    };
    function row(one) {
      const line = el("tr", { class: "row", "data-id": one.id, onclick: () => { open(one); history.replaceState(null, "", `#${encodeURIComponent(one.id)}`); } },
        el("td", null, el("button", { class: "id", type: "button" }, one.id)), el("td", null, one.mode), el("td", { class: "number" }, String(one.step)),
        el("td", { class: one.state === "succeeded" ? "" : "bad" }, one.state), el("td", { class: "number" }, compact(one.reward)),
        el("td", { class: "task", title: text(one.task) }, text(one.task)));
      if (one === chosen) line.classList.add("chosen");
      return line;
    }
    function draw() {
      const found = all.filter(fits);
      body.replaceChildren(...found.slice(0, state.shown).map(row));
      const more = el("button", { class: "more-rows", type: "button", onclick: () => { state.shown += BATCH; draw(); } }, "show more");
      foot.replaceChildren(`${Math.min(state.shown, found.length)} of ${found.length} rollouts `, found.length > state.shown ? more : "");
      if (found.length && !found.includes(chosen)) open(found[0]);
    }
    const heads = ["rollout", "mode", "step", "state", "reward", "task"];
    page.append(el("div", { class: "browser" }, el("div", { class: "list" },
      el("table", null, el("thead", null, el("tr", null, heads.map((name) => el("th", ["step", "reward"].includes(name) ? { class: "number" } : null, name)))), body), foot), detail));
    const openAsked = () => {
      const wanted = all.find((one) => encodeURIComponent(one.id) === location.hash.slice(1));
      if (!wanted) return;
      open(wanted);
      filters.scrollIntoView();
    };
    draw();
    window.addEventListener("hashchange", openAsked);
  }

  function showRollout(box, one) {
    const versions = Object.entries(one.versions).map(([name, version]) => `${name} v${version}`).join(", ");
    const facts = [one.mode, `step ${one.step}`, one.state, isNumber(one.reward) ? `reward ${compact(one.reward)}` : "no reward",
      duration(one.ms), `${one.calls} model calls`, versions].filter(Boolean);
    box.replaceChildren(el("h3", null, el("code", null, one.id)), el("p", { class: "facts" }, facts.join(" · ")),
      el("h3", null, "Task"), el("pre", null, text(one.task)));
    if (one.whole_task !== one.task) box.append(el("details", null, el("summary", null, "whole task"), el("pre", null, text(one.whole_task))));
    if (one.output !== null) box.append(el("h3", null, "Output"), ...labelled(parsed(text(one.output))).flatMap(([name, value]) =>
      [name ? el("div", { class: "speaker" }, name) : "", el("pre", null, value)]));
    if (one.error !== null) box.append(el("h3", { class: "bad" }, "Error"), el("pre", { class: "bad" }, text(one.error)));
    if (one.rewards.length) {
      box.append(el("h3", null, "Rewards"), el("pre", null, one.rewards.map(([name, value, role]) =>
        `${text(name)} ${compact(value)}${text(role) ? ` (for ${text(role)})` : ""}`).join("\n")));
    }
    box.append(el("h3", null, "Spans"), ...one.spans.map((span) => spanView(span, one.ms)));
    box.scrollTop = 0;
  }
  function spanView(span, whole) {
    const isPoint = ["reward", "message", "event"].includes(span.kind);
    const bits = [];
    if (text(span.role)) bits.push(text(span.role));
    if (!isPoint) bits.push(duration(span.ms));
    if (span.tokens) bits.push(`${span.tokens[0]} + ${span.tokens[1]} tokens`);
    if ("policy" in span) bits.push(`${text(span.policy)} v${span.version}`);
    if ("finish" in span && text(span.finish) !== "stop") bits.push(text(span.finish));
    if (span.attempts > 1) bits.push(`${span.attempts} HTTP attempts`);
    for (const [name, value] of span.rewards || []) bits.push(`${text(name)} ${compact(value)}`);
    const isBroken = span.status !== "ok";
    const box = el("div", { class: `span ${span.kind}${isBroken ? " broken" : ""}` },
      el("div", { class: "head" }, el("span", { class: "kind" }, span.kind.replace("_", " ")), el("span", { class: "what" }, text(span.name)),
        el("span", { class: "who" }, bits.join(" · ")), isBroken ? el("span", { class: "bad" }, span.status) : null));
    box.style.setProperty("--depth", Math.min(span.depth, 8));
    if (!isPoint && whole > 0) {
      const bar = el("i");
      bar.style.left = `${Math.min(99, Math.max(0, (100 * span.start) / whole))}%`;
      bar.style.width = `${Math.min(100, Math.max(0.3, (100 * span.ms) / whole))}%`;
      box.append(el("div", { class: "bar", title: `from ${duration(span.start)}` }, bar));
    }
    if ("error" in span) box.append(el("pre", { class: "bad" }, text(span.error)));
    if (span.prompt && span.prompt.length) {
      const last = span.prompt[span.prompt.length - 1];
      if (span.prompt.length > 1) {
        box.append(el("details", null, el("summary", null, `earlier in the prompt: ${span.prompt.length - 1}`),
          span.prompt.slice(0, -1).map((one) => message(one, false))));
      }
      box.append(message(last, false));
    }
    for (const one of span.answer || []) box.append(message(one, true));
    if (span.attributes && span.attributes.length) {
      const lines = span.attributes.map(([name, value]) => `${text(name)} = ${text(value)}`).join("\n");
      box.append(lines.length < 300 ? el("pre", null, lines) : el("details", null, el("summary", null, "attributes"), el("pre", null, lines)));
    }
    return box;
  }
  function message([speaker, words], isAnswer) {
    return el("div", { class: `message${isAnswer ? " answer" : ""}` },
      el("div", { class: "speaker" }, isAnswer ? "answer" : text(speaker) || "message"), el("pre", null, text(words)));
  }

  header();
  heldOut();
  curves();
  roles();
  examples();
  failures();
  browser();
  configuration();
  if (location.hash) dispatchEvent(new HashChangeEvent("hashchange")); // now that the page has its full height
})();
