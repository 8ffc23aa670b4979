"use strict";
// Every text comes onto the page through textContent: what a model wrote is never read as markup.
(() => {
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const percent = (v, digits = 0) => v == null ? "–" : (100 * v).toFixed(digits) + "%";
const count = (v) => v == null ? "–" : Math.round(v).toLocaleString("en");
const fixed = (v, digits = 3) => v == null ? "–" : Number(v).toFixed(digits);
const duration = (s) => s == null ? "–" : s < 60 ? Math.round(s) + " s" : s < 3600 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";
const sum = (values) => values.reduce((a, b) => a + (b || 0), 0);
const plural = (n, word) => count(n) + " " + word + (n === 1 ? "" : "s");

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange" || name === "oninput") node[name] = value;
    else if (value != null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c != null && c !== ""));
  return node;
}
function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "stroke" || name === "fill") node.style[name] = value; else node.setAttribute(name, value);
  }
  if (text != null) node.textContent = text;
  parent.append(node);
  return node;
}

// ---- theme
const root = document.documentElement, media = matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = media.matches ? "dark" : "light";
media.addEventListener("change", () => { root.dataset.theme = media.matches ? "dark" : "light"; });
$("theme").onclick = () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; };

// ---- charts
const tip = $("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, event.clientY - box.height - 14) + "px";
}
function ticks(low, high, most) {
  const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw) || 1;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(10));
  return found;
}
// One chart: series of points [x, y], an optional band [x, low, high], bars, and what to say at an x.
function chart(id, spec) {
  const figure = $(id);
  figure.replaceChildren(make("figcaption", {}, make("b", {}, spec.title), make("span", {}, spec.subtitle)));
  const all = spec.series.flatMap((s) => [...s.points, ...(s.band || []).flatMap(([x, a, b]) => [[x, a], [x, b]])]);
  if (!all.length) { figure.append(make("p", { class: "empty" }, "Nothing yet.")); return; }
  if (spec.series.length > 1 || spec.legend) {
    figure.append(make("ul", { class: "legend" }, ...spec.series.filter((s) => s.name).map((s) => {
      const item = make("li", { class: s.dashed ? "dashed" : null }, make("i"), s.name);
      item.firstChild.style.borderColor = s.color;
      if (s.thin) item.firstChild.style.opacity = .45;
      return item;
    })));
  }
  const width = Math.max(260, figure.clientWidth - 36), height = figure.className === "wide" ? 300 : 250;
  const svg = draw(figure, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title });
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (spec.bars) { x0 -= .6; x1 += .6; } else if (x0 === x1) { x0 -= 1; x1 += 1; }
  const [y0, y1] = [spec.yMin ?? 0, spec.yMax ?? (Math.max(...ys) * 1.08 || 1)];
  const yTicks = ticks(y0, y1, 5);
  const left = Math.max(...yTicks.map((t) => spec.yFormat(t).length)) * 7 + 30, right = 14, top = 16, bottom = 42;
  const X = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
  const Y = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
  for (const t of yTicks) {
    draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: Y(t), y2: Y(t) });
    draw(svg, "text", { x: left - 8, y: Y(t) + 4, "text-anchor": "end" }, spec.yFormat(t));
  }
  const xTicks = spec.xTicks || ticks(x0, x1, width / 90);
  const thin = Math.ceil(xTicks.length / (width / 34));
  xTicks.forEach((t, i) => { if (i % thin === 0) draw(svg, "text", { x: X(t), y: height - bottom + 18, "text-anchor": "middle" }, count(t)); });
  draw(svg, "line", { class: "axis", x1: left, x2: width - right, y1: Y(y0), y2: Y(y0) });
  draw(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, spec.xLabel);
  draw(svg, "text", { transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, spec.yLabel);
  for (const at of spec.marks || []) {
    draw(svg, "line", { class: "hover", x1: X(at.x), x2: X(at.x), y1: top, y2: height - bottom });
    draw(svg, "text", { x: X(at.x) + 4, y: top + 8 }, at.text);
  }
  for (const s of spec.series) {
    if (s.band && s.band.length > 1) {
      const line = [...s.band.map(([x, low]) => [x, low]), ...[...s.band].reverse().map(([x, , high]) => [x, high])];
      draw(svg, "polygon", { class: "band", points: line.map(([x, y]) => `${X(x)},${Y(y)}`).join(" "), fill: s.color, opacity: .14 });
    } else if (s.band) {
      for (const [x, low, high] of s.band) draw(svg, "line", { x1: X(x), x2: X(x), y1: Y(low), y2: Y(high), stroke: s.color, "stroke-width": 6, opacity: .25 });
    }
    if (s.bars) {
      const wide = Math.min(64, (width - left - right) / (x1 - x0) * .62);
      for (const [x, y] of s.points) {
        draw(svg, "rect", { class: "bar", x: X(x) - wide / 2, y: Y(y), width: wide, height: Math.max(0, Y(y0) - Y(y)), rx: 3, fill: s.color });
        const inside = Y(y0) - Y(y) > 26; // at the bar's foot, clear of the line over it
        if (wide > 30 && y > 0) draw(svg, "text", { class: "value", x: X(x), y: inside ? Y(y0) - 9 : Y(y) - 7, "text-anchor": "middle", fill: inside ? "var(--card)" : "var(--ink)" }, spec.yFormat(y));
      }
      continue;
    }
    draw(svg, "polyline", { class: "curve", points: s.points.map(([x, y]) => `${X(x)},${Y(y)}`).join(" "), fill: "none", stroke: s.color, "stroke-width": s.thin ? 1 : 2.5, opacity: s.thin ? .45 : 1, "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": s.dashed ? "5 5" : "none" });
    if (!s.plain) for (const [x, y, few] of s.points) draw(svg, "circle", { cx: X(x), cy: Y(y), r: 4, fill: few ? "var(--card)" : s.color, stroke: s.color, "stroke-width": 2 });
  }
  const places = [...new Set(xs)].sort((a, b) => a - b);
  const line = draw(svg, "line", { class: "hover", y1: top, y2: height - bottom, visibility: "hidden" });
  const area = draw(svg, "rect", { class: "area", x: left - 10, y: 0, width: width - left - right + 20, height: height - bottom, fill: "transparent" });
  const follow = (event) => {
    const box = svg.getBoundingClientRect(), at = x0 + ((event.clientX - box.left) * width / box.width - left) / (width - left - right) * (x1 - x0);
    const x = places.reduce((best, p) => Math.abs(p - at) < Math.abs(best - at) ? p : best, places[0]);
    line.setAttribute("x1", X(x)); line.setAttribute("x2", X(x)); line.setAttribute("visibility", "visible");
    showTip(event, spec.say(x));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); });
}

const rounds = D.rounds, indices = rounds.map((r) => r.index);
const at = (index) => rounds.find((r) => r.index === index) || {};
const shade = (i, n) => `color-mix(in oklab, var(--student) ${Math.round(n < 2 ? 100 : 34 + 66 * i / (n - 1))}%, var(--card))`; // later rounds stronger
const FEW_TURNS = 10;
const diagnosed = rounds.filter((r) => r.evaluate?.drift);
const points = (get) => rounds.map((r) => [r.index, get(r)]).filter((p) => p[1] != null);

function charts() {
  const evaluated = (part) => ({
    points: points((r) => r.evaluate?.[part]?.success),
    band: rounds.filter((r) => r.evaluate?.[part]?.ci_low != null).map((r) => [r.index, r.evaluate[part].ci_low, r.evaluate[part].ci_high]),
  });
  const share = (e) => e ? `${percent(e.success, 1)}  (${e.solved} of ${e.tasks}; 95% interval ${percent(e.ci_low)} to ${percent(e.ci_high)})` : "–";
  const success = [{ name: "held-out tasks", color: "var(--heldout)", ...evaluated("heldout") }];
  if (rounds.some((r) => r.evaluate?.train)) success.push({ name: "training tasks", color: "var(--train)", ...evaluated("train") });
  success.push({ name: "while collecting (student and teacher mixed)", color: "var(--soft)", dashed: true, points: points((r) => r.collect && r.collect.episodes ? r.collect.solved / r.collect.episodes : null) });
  chart("chart-success", {
    title: "Tasks solved, by round", subtitle: "The student alone after each round's training; the bands are 95% confidence intervals.",
    series: success, xLabel: "round", yLabel: "tasks solved", yMax: 1, yFormat: (v) => percent(v), xTicks: indices,
    say: (x) => { const r = at(x); return [`Round ${x}`, r.evaluate?.heldout && `held out: ${share(r.evaluate.heldout)}`, r.evaluate?.train && `training: ${share(r.evaluate.train)}`, r.collect && `while collecting: ${r.collect.solved} of ${r.collect.episodes}`].filter(Boolean).join("\n"); },
  });
  chart("chart-teacher", {
    title: "Who acted", subtitle: "Share of executed turns that were the teacher's, and the beta that was asked for.", bars: true,
    series: [{ name: "teacher's turns", color: "var(--teacher)", bars: true, points: points((r) => r.collect?.teacher_turn_share) }, { name: "beta", color: "var(--ink)", dashed: true, points: points((r) => r.collect?.beta) }],
    xLabel: "round", yLabel: "share of turns", yMax: 1.06, yFormat: (v) => v > 1 ? "" : percent(v), xTicks: indices,
    say: (x) => `Round ${x}\nteacher's turns: ${percent(at(x).collect?.teacher_turn_share, 1)}\nbeta: ${fixed(at(x).collect?.beta, 2)}`,
  });
  const compared = rounds.filter((r) => r.collect?.agreement_by_depth?.length);
  chart("chart-agreement", {
    title: "Agreement by depth", subtitle: "Share of the student's own turns in which it did exactly what the teacher would have done. Hollow: fewer than ten turns.", legend: true,
    series: compared.map((r, i) => ({ name: `round ${r.index}`, color: shade(i, compared.length), points: r.collect.agreement_by_depth.map(([d, n, k]) => [d + 1, n ? k / n : 0, n < FEW_TURNS]) })),
    xLabel: "turn of the episode (first of each bucket)", yLabel: "agreement", yMax: 1, yFormat: (v) => percent(v),
    xTicks: [...new Set(compared.flatMap((r) => r.collect.agreement_by_depth.map((d) => d[0] + 1)))].sort((a, b) => a - b),
    say: (x) => [`From turn ${x}`, ...compared.map((r) => { const b = r.collect.agreement_by_depth.find((d) => d[0] === x - 1); return b && `round ${r.index}: ${percent(b[2] / b[1])}  (${b[2]} of ${b[1]})`; })].filter(Boolean).join("\n"),
  });
  chart("chart-labels", {
    title: "Labelled turns", subtitle: "States that the teacher labelled in each round.", bars: true,
    series: [{ name: "", color: "var(--student)", bars: true, points: points((r) => r.collect?.labelled_turns) }],
    xLabel: "round", yLabel: "labelled turns", yFormat: count, xTicks: indices,
    say: (x) => `Round ${x}\n${plural(at(x).collect?.labelled_turns, "labelled turn")}\n${count(sum(rounds.filter((r) => r.index <= x).map((r) => r.collect?.labelled_turns)))} up to this round`,
  });
  const reach = Math.max(1, Math.round(D.losses.length / 60)); // points on either side of a running mean
  const smooth = D.losses.map(([x, , r], i) => {
    const near = D.losses.slice(Math.max(0, i - reach), i + reach + 1).filter((p) => p[2] === r);
    return [x, sum(near.map((p) => p[1])) / near.length];
  });
  const starts = D.losses.filter((p, i) => i === 0 || D.losses[i - 1][2] !== p[2]);
  chart("chart-loss", {
    title: "Training loss", subtitle: `Cross-entropy per label token over ${plural(D.loss_steps, "step")}; the bold line is a running mean within each round.`,
    series: [{ name: "loss", color: "var(--student)", points: D.losses, plain: true, thin: true }, { name: "running mean", color: "var(--student)", points: smooth, plain: true }],
    marks: starts.length < 13 ? starts.map((p) => ({ x: p[0], text: "r" + p[2] })) : [], xLabel: "optimizer step, all rounds", yLabel: "loss (nats)", yFormat: (v) => String(v),
    say: (x) => { const i = D.losses.findIndex((p) => p[0] === x); return `Step ${x}, round ${D.losses[i][2]}\nloss ${fixed(D.losses[i][1])}\nrunning mean ${fixed(smooth[i][1])}`; },
  });
  driftChart();
}

// Errors by depth, of the last diagnosed round.
function driftChart() {
  const last = diagnosed.at(-1), rows = last?.evaluate.drift.by_depth;
  $("drift").hidden = !last;
  if (!last) return;
  const series = (name, color, column) => ({ name, color, points: rows.filter((b) => b[column]).map((b) => [b[0] + 1, b[column + 1] / b[column], b[column] < FEW_TURNS]) });
  const say = (b, column) => b[column] ? `${percent(b[column + 1] / b[column])}  (${b[column + 1]} of ${b[column]})` : "no turns";
  chart("chart-drift", {
    title: "Errors by depth", subtitle: `Share of the student's turns with another action than the teacher's, round ${last.index}. Hollow: fewer than ten turns.`,
    series: [series("on the teacher's path", "var(--student)", 1), series("off it", "var(--differ)", 3)],
    xLabel: "turn of the episode (first of each bucket)", yLabel: "errors", yMax: 1, yFormat: (v) => percent(v), xTicks: rows.map((b) => b[0] + 1),
    say: (x) => { const b = rows.find((row) => row[0] === x - 1); return `From turn ${x}\non the path: ${say(b, 1)}\noff it: ${say(b, 3)}`; },
  });
}

// ---- headline
function headline() {
  const done = rounds.filter((r) => r.evaluate?.heldout), first = done[0]?.evaluate.heldout, last = done.at(-1)?.evaluate.heldout;
  const add = (value, text) => $("numbers").append(make("div", { class: "number" }, make("b", {}, value), make("span", {}, text)));
  if (last) add(percent(last.success), `of held-out tasks solved after round ${done.at(-1).index} (95%: ${percent(last.ci_low)}–${percent(last.ci_high)})`);
  if (done.length > 1) {
    const points = 100 * (last.success - first.success);
    add((points >= 0 ? "+" : "−") + Math.abs(points).toFixed(1), `points against round ${done[0].index} (${percent(first.success)})`);
  }
  add(count(sum(rounds.map((r) => r.collect?.labelled_turns))), "turns labelled by the teacher");
  add(count(sum(rounds.map((r) => r.collect?.episodes))), "episodes collected");
  const recent = rounds.filter((r) => r.collect).at(-1)?.collect;
  if (recent) add(recent.median_turns ?? "–", "turns in a median episode of the last collection");
  const seconds = sum(rounds.flatMap((r) => [r.collect, r.train, r.evaluate]).map((s) => s?.duration_s));
  add(duration(seconds), "collecting, training and evaluating");
  const planned = D.planned_rounds;
  $("lede").textContent = !rounds.length ? "No stage of this run has finished yet."
    : `${plural(rounds.length, "round")}${planned && planned > rounds.length ? ` of ${planned}` : ""}; round 0 learns from the teacher's own episodes, each later round from the states that the student reaches.`;
  $("foot").textContent = `Written ${D.written} by megatron-dagger report.`;
}

function table() {
  const with2 = (main, small) => [main, small ? make("small", {}, small) : ""];
  const outOf = (s) => s && `${s.solved}/${s.tasks}${s.given_up ? `, ${s.given_up} abandoned` : ""}`;
  fill("rounds", rounds, [
    ["round", (r) => [r.index]],
    ["held out", (r) => with2(percent(r.evaluate?.heldout?.success, 1), outOf(r.evaluate?.heldout))],
    ["training tasks", (r) => with2(percent(r.evaluate?.train?.success, 1), outOf(r.evaluate?.train))],
    ["episodes", (r) => with2(count(r.collect?.episodes), [r.collect?.broken_episodes && `${r.collect.broken_episodes} broken`, r.collect?.given_up && `${plural(r.collect.given_up, "task")} abandoned`].filter(Boolean).join(", "))],
    ["labelled turns", (r) => [count(r.collect?.labelled_turns)]],
    ["beta", (r) => [fixed(r.collect?.beta, 2)]],
    ["teacher's turns", (r) => [percent(r.collect?.teacher_turn_share, 1)]],
    ["agreement", (r) => [percent(r.collect?.agreement, 1)]],
    ["finished", (r) => with2(count(r.collect?.finished), r.collect?.truncated ? `${r.collect.truncated} cut off` : "")],
    ["median turns", (r) => [r.collect?.median_turns ?? "–"]],
    ["steps", (r) => [count(r.train?.steps)]],
    ["loss", (r) => with2(fixed(r.train?.mean_loss_last_10 ?? r.train?.last_loss), r.train && `from ${fixed(r.train.first_loss)}`)],
    ["tokens/s", (r) => [count(r.train?.tokens_per_s)]],
    ["time", (r) => [duration(sum([r.collect, r.train, r.evaluate].map((s) => s?.duration_s)))]],
  ]);
  const drift = (name, get) => [name, (r) => get(r.evaluate.drift)];
  const errors = (part) => with2(percent(part.share, 1), `${count(part.errors)} of ${plural(part.turns, "turn")}`);
  const solved = (part) => with2(percent(part.success, 1), part.tried ? `${part.solved} of ${part.tried}; ${percent(part.ci_low)}–${percent(part.ci_high)}` : "not tried");
  fill("drift-rounds", diagnosed, [
    ["round", (r) => [r.index]],
    drift("errors on the path", (d) => errors(d.on_path)),
    drift("errors off the path", (d) => errors(d.off_path)),
    drift("new states", (d) => with2(percent(d.new_states_share, 1), `${count(d.new_states)} of ${count(d.visited_states)}`)),
    drift("teacher alone solves", (d) => solved(d.expert_alone)),
    drift("from the student's states", (d) => solved(d.expert_from_student_states)),
  ]);
}
function fill(id, rows, columns) {
  $(id).append(
    make("thead", {}, make("tr", {}, ...columns.map(([name]) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows.map((r) => make("tr", {}, ...columns.map(([, cell]) => make("td", {}, ...cell(r).map((c) => typeof c === "number" ? String(c) : c)))))));
}

// ---- episodes
const KINDS = { heldout: "held out", train: "training task, evaluated", collected: "collected" };
const differs = (e) => e.turns.filter((t) => t.would != null).length;
let shown = [], current = null;
const chosen = { kind: "", round: "", outcome: "", differ: "", text: "" };

function filters() {
  const select = (name, label, options) => make("label", {}, label, make("select", { id: "filter-" + name, onchange: (e) => { chosen[name] = e.target.value; list(); } }, ...options.map(([value, text]) => make("option", { value }, text))));
  const stops = [...new Set(D.episodes.map((e) => e.stop))].sort();
  const kinds = Object.keys(KINDS).filter((k) => D.episodes.some((e) => e.kind === k));
  $("filters").append(
    select("kind", "Kind", [["", "all"], ...kinds.map((k) => [k, KINDS[k]])]),
    select("round", "Round", [["", "all"], ...[...new Set(D.episodes.map((e) => e.round))].sort((a, b) => a - b).map((r) => [r, r])]),
    select("outcome", "Outcome", [["", "all"], ["solved", "solved"], ["unsolved", "not solved"], ...stops.map((s) => [s, s.replaceAll("_", " ")])]),
    select("differ", "Student and teacher", [["", "all"], ["yes", "differ somewhere"], ["no", "agree throughout"]]),
    make("label", {}, "Task", make("input", { id: "filter-text", type: "search", placeholder: "part of its name", size: 14, oninput: (e) => { chosen.text = e.target.value; list(); } })));
}
function matches(e) {
  return (!chosen.kind || e.kind === chosen.kind) && (chosen.round === "" || e.round === +chosen.round)
    && (!chosen.outcome || (chosen.outcome === "solved" ? e.solved : chosen.outcome === "unsolved" ? !e.solved : e.stop === chosen.outcome))
    && (!chosen.differ || (differs(e) > 0) === (chosen.differ === "yes")) && e.task.toLowerCase().includes(chosen.text.toLowerCase());
}
function list() {
  shown = D.episodes.filter(matches);
  const part = D.episodes.length < D.episodes_in_all ? `This page holds ${count(D.episodes.length)} of the run's ${plural(D.episodes_in_all, "episode")}, chosen evenly over rounds and kinds. ` : "";
  $("episodes-note").textContent = `${part}${shown.length === D.episodes.length ? "" : `${count(shown.length)} of ${count(D.episodes.length)} match. `}Each bar below a name is a turn: blue the student's, amber the teacher's, red where the teacher would have done something else.`;
  $("list").replaceChildren(...shown.map((e) => {
    const strip = make("span", { class: "strip", "aria-hidden": "true" }, ...e.turns.map((t) => make("i", { class: t.would != null ? "differ" : t.by })));
    return make("button", { type: "button", class: "item", role: "option", "aria-selected": e === current, onclick: () => open(e, true) },
      make("b", {}, e.task), make("span", {}, `round ${e.round}, ${KINDS[e.kind]}, `, make("span", { class: e.solved ? "good" : "bad", style: "display:inline" }, e.solved ? "solved" : "not solved"), `, ${plural(e.turns.length, "turn")}`), strip);
  }));
  if (!shown.length) $("list").append(make("p", { class: "empty" }, D.episodes.length ? "No episode matches." : "No episodes yet."));
}
function open(e, follow) {
  current = e;
  for (const [i, item] of [...$("list").querySelectorAll(".item")].entries()) item.setAttribute("aria-selected", shown[i] === e);
  const place = shown.indexOf(e), step = (n, text) => make("button", { type: "button", class: "quiet", disabled: !shown[place + n], onclick: () => open(shown[place + n], true) }, text);
  const reader = $("reader");
  reader.replaceChildren(
    make("h3", {}, e.task),
    make("p", { class: "about" }, `Round ${e.round}, ${KINDS[e.kind]}${e.attempt ? `, attempt ${e.attempt}` : ""}${e.kind === "collected" ? `, beta ${e.beta.toFixed(2)}` : ""}, ${duration(e.seconds)}`),
    make("nav", { "aria-label": "Episodes" }, make("button", { type: "button", class: "quiet back", onclick: back }, "All episodes"), step(-1, "Previous"), step(1, "Next")),
    ...e.turns.map((t, i) => make("section", { class: "turn" },
      make("header", {}, `Turn ${i + 1}`, make("span", { class: "badge " + t.by }, t.by), t.would != null ? make("span", { class: "badge differ" }, "teacher differs") : "", t.labelled ? "" : "no label"),
      make("div", { class: "saw", tabindex: 0 }, make("pre", {}, t.saw)),
      make("div", { class: "did " + t.by }, t.would != null ? make("span", {}, `The ${t.by} did`) : "", make("pre", {}, t.did)),
      t.would != null ? make("div", { class: "did differ" }, make("span", {}, "The teacher would have done"), make("pre", {}, t.would)) : "")),
    make("p", { class: "outcome " + (e.solved ? "good" : "bad") }, `${e.solved ? "Solved" : "Not solved"} after ${plural(e.turns.length, "turn")} (${e.stop.replaceAll("_", " ")})`));
  document.querySelector(".browser").classList.toggle("reading", follow);
  reader.scrollTop = 0;
  if (follow && innerWidth <= 820) { reader.scrollIntoView(); reader.focus({ preventScroll: true }); }
}
function back() {
  document.querySelector(".browser").classList.remove("reading");
  document.querySelector('.item[aria-selected="true"]')?.focus();
}

headline(); table(); charts(); filters(); list();
if (shown.length) open(shown[0], false);
let waiting = 0, width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; clearTimeout(waiting); waiting = setTimeout(charts, 120); } });
})();
