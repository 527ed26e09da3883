// Series over time.
import { OURS, S, STATUS, TONES, Z90, context, css, el, info, r2, rivals, room, say, span, tone, width } from "./core.js";

const charts = {};
const STAGES = [["wire in", "#8b929c"], ["queue", TONES[3]], ["solve", TONES[2]], ["publish", TONES[1]]];
const HEIGHT = 128, POINTS = 400;
const quantity = (name, unit) => (unit ? name + " (" + unit + ")" : name);
export const number = (v) => (v === null || v === undefined || !isFinite(v) ? "–" : Number(v.toPrecision(3)).toString());

// The times shown, in seconds, as the figures are wide: the newest bins enter on the right.
const times = () => [(S.now - span()) * width(), Math.max(S.now, 1) * width()];

function chart(place, title, lines, bands, height) {
  const axis = { stroke: () => css("--soft"), font: "11px system-ui", grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 } };
  const series = [{ label: "s" }].concat(lines.map((line) => ({
    label: line.name, stroke: line.tone, width: line.width === undefined ? 1.6 : line.width, dash: line.dash, points: { show: false }, value: (_, v) => number(v),
  })));
  return new uPlot({ width: Math.max(120, room(place)), height: height || HEIGHT, series, bands: bands || [],
    scales: { x: { time: false, range: times } }, legend: { show: false }, cursor: { drag: { x: false, y: false } },
    axes: [{ ...axis, size: 24, values: (_, marks) => marks.map((t) => (t < 0 ? "" : t + " s")) }, { ...axis, size: 50, space: 24, label: title, labelSize: 16, labelFont: "11px system-ui" }] },
    [[], ...lines.map(() => [])], place);
}

function legend(id, items) {
  el(id).replaceChildren(...items.map(([name, colour, dash]) => {
    const item = document.createElement("span"), mark = document.createElement("i");
    mark.style.borderTop = "3px " + (dash ? "dotted " : "solid ") + colour;
    item.append(mark, name);
    return item;
  }));
}

let built = "";
export function build() {
  const others = rivals(), m = S.inputs;
  const key = JSON.stringify([S.state.names, S.state.units, S.state.bin_width, others, S.truth, Math.min(m, 4)]);
  if (key === built) return;
  built = key;
  for (const u of Object.values(charts).flat()) u.destroy();
  const ours = TONES[0], ink = "var(--ink)", tall = S.state.names.length < 3 ? 165 : HEIGHT;
  const known = S.truth ? [{ name: "truth", tone: () => css("--ink"), width: 1.4, dash: [4, 3] }] : [];
  charts.traces = S.state.names.slice(0, 3).map((name, d) => chart(el("traces"), quantity(name, S.state.units[d]), [
    { name: "from", tone: ours + "30", width: 0 }, { name: "to", tone: ours + "30", width: 0 }, { name: OURS, tone: ours, width: 2 },
    ...known, ...others.map((one) => ({ name: one, tone: tone(one, others), width: 1.2 }))], [{ series: [2, 1], fill: ours + "30" }], tall));
  legend("traces-legend", [[OURS + ", 90 % band", ours], ...(S.truth ? [["truth", ink, true]] : []), ...others.map((one) => [one, tone(one, others)])]);
  charts.latents = [chart(el("latents"), "a.u.", TONES.map((t, k) => ({ name: "no. " + (k + 1), tone: t })))];
  charts.inputs = m ? [chart(el("inputs"), "a.u.", TONES.slice(0, m).map((t, k) => ({ name: "input " + (k + 1), tone: t })))] : [];
  el("inputs-none").hidden = m > 0;
  charts.latency = [chart(el("latency"), "ms", [...STAGES.map(([name, t]) => ({ name, tone: t })), { name: "total", tone: ours, width: 2 }, { name: "deadline", tone: STATUS.late, dash: [6, 4] }])];
  legend("latency-legend", [...STAGES, ["total", ours], ["deadline", STATUS.late, true]]);
  charts.drift = [chart(el("drift"), "bits / spike", [{ name: "bits per spike, 5 s", tone: ours, width: 2 }, { name: "mean rates", tone: STATUS.late, dash: [6, 4] }])];
}

// The latents that vary most, their numbers kept for a while so that colours do not jump.
let order = [];
function ordered(view) {
  const n = view[0].z.length, now = performance.now();
  if (order.n === n && now - order.at < 2000) return order;
  const spread = Array.from({ length: n }, (_, k) => {
    const m = view.reduce((s, b) => s + b.z[k], 0) / view.length;
    return [view.reduce((s, b) => s + (b.z[k] - m) ** 2, 0), k];
  });
  order = spread.sort((a, b) => b[0] - a[0]).slice(0, 4).map((x) => x[1]);
  order.n = n; order.at = now;
  return order;
}

// bits per spike of the last 5 s against the best 5 s there were
export function drift(all) {
  const values = running(all).slice(Math.round(5 / width())).filter((v) => v !== null);
  const best = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return values.length && best > 0.005 ? Math.max(0, 1 - values[values.length - 1] / best) : null;
}

export function running(view) { // bits per spike over the last 5 s, at each bin
  const n = Math.max(1, Math.round(5 / width()));
  let bits = 0, spikes = 0;
  return view.map((b, k) => {
    bits += b.bits || 0; spikes += b.spikes;
    if (k >= n) { bits -= view[k - n].bits || 0; spikes -= view[k - n].spikes; }
    return spikes > 0 ? bits / spikes : null;
  });
}

// One bin of each few, the same ones while time goes on, and the newest.
function thinned(whole) {
  const step = Math.max(1, Math.ceil(span() / POINTS));
  const keep = whole.map((b, k) => k === whole.length - 1 || !k || Math.floor(b.i / step) !== Math.floor(whole[k - 1].i / step));
  const thin = (values) => (step === 1 ? values : values.filter((_, k) => keep[k]));
  const view = thin(whole), time = view.map((b) => b.i * width());
  const put = (u, columns) => {
    const wide = Math.max(120, room(u.root.parentNode));
    if (u.width !== wide) u.setSize({ width: wide, height: u.height });
    u.setData([time, ...columns]);
  };
  return [view, put, thin];
}
const of = (values, d) => (values && values[d] !== undefined ? values[d] : null);

export function traces(whole) {
  const [view, put] = thinned(whole), names = rivals();
  charts.traces.forEach((u, d) => put(u, [
    ...[-1, 1, 0].map((k) => view.map((b) => (of(b.y, d) === null ? null : b.y[d] + k * Z90 * (b.s[d] || 0)))),
    ...(S.truth ? [view.map((b) => of(b.truth, d))] : []),
    ...names.map((name) => view.map((b) => of(b.decoders && b.decoders[name], d)))]));
}

export function latents(whole) {
  const [view, put] = thinned(whole), size = view[view.length - 1].z.length;
  const finite = view.filter((b) => b.z.length === size && b.z.every((v) => v !== null));
  if (finite.length > 2) { const which = ordered(finite); put(charts.latents[0], TONES.map((_, j) => view.map((b) => of(b.z, which[j])))); }
  charts.inputs.forEach((u) => put(u, u.series.slice(1).map((_, k) => view.map((b) => of(b.u, k)))));
}

const took = (b, stage) => (stage === "total" ? b.total : of(b.ms, stage.replace(" ", "_")));
export function latency(whole) {
  const [view, put] = thinned(whole), deadline = info() ? info().deadline_ms : null;
  put(charts.latency[0], [...STAGES, ["total"]].map(([name]) => view.map((b) => took(b, name))).concat([view.map(() => deadline)]));
  spread(view, deadline);
}

export function score(whole) {
  const [view, put, thin] = thinned(whole);
  put(charts.drift[0], [thin(running(whole)), view.map(() => 0)]);
  statuses(whole);
}

function statuses(whole) {
  const [c, w, h] = context("statuses"), count = span(), from = S.now - count, wide = Math.max(1, w / count);
  for (const b of whole) {
    c.fillStyle = STATUS[b.status] || "#000";
    c.fillRect(((b.i - 1 - from) / count) * w, 0, wide + 0.5, h);
  }
}

// How the bins shown are distributed over latency: the total as bars, each stage as a line.
const CELLS = 60;
function spread(view, deadline) {
  const [c, w, h, ratio] = context("spread"), foot = 15 * ratio;
  const stages = [...STAGES, ["total", TONES[0]]].map(([name, t]) => [view.map((b) => took(b, name)).filter((v) => v > 0), t]).filter(([values]) => values.length);
  if (!stages.length) return;
  const every = stages.flatMap(([values]) => values);
  const low = Math.log10(Math.max(0.01, 0.8 * every.reduce((a, b) => Math.min(a, b)))), high = Math.log10(1.3 * every.reduce((a, b) => Math.max(a, b), deadline || 0));
  const place = (v) => ((Math.log10(v) - low) / (high - low)) * w;
  for (const [values, colour] of stages.reverse()) {
    const counts = Array(CELLS).fill(0);
    for (const v of values) counts[Math.min(CELLS - 1, Math.max(0, Math.floor((place(v) / w) * CELLS)))] += 1;
    const top = Math.max(...counts), y = (n) => h - foot - (n / top) * (h - foot - 2);
    if (colour === TONES[0]) {
      c.globalAlpha = 0.45; c.fillStyle = colour;
      counts.forEach((n, k) => n && c.fillRect((k / CELLS) * w, y(n), w / CELLS - 1, h - foot - y(n)));
      c.globalAlpha = 1;
      continue;
    }
    c.strokeStyle = colour; c.lineWidth = 1.5 * ratio; c.beginPath();
    counts.forEach((n, k) => { c.lineTo((k / CELLS) * w, y(n)); c.lineTo(((k + 1) / CELLS) * w, y(n)); });
    c.stroke();
  }
  c.fillStyle = css("--soft");
  const each = Math.ceil((64 * ratio * (high - low)) / w); // so that labels do not overlap
  for (let e = Math.ceil(low); e <= Math.floor(high); e += each) {
    const x = place(10 ** e);
    c.globalAlpha = 0.5; c.fillRect(x, h - foot, ratio, 3 * ratio); c.globalAlpha = 1;
    c.textAlign = x < 30 * ratio ? "left" : x > w - 30 * ratio ? "right" : "center";
    c.fillText(number(10 ** e) + " ms", x, h - 2 * ratio);
  }
  c.textAlign = "left";
  if (!deadline) return;
  c.fillStyle = STATUS.late; c.fillRect(place(deadline) - ratio, 0, 2 * ratio, h - foot);
  c.textAlign = "right"; c.fillText("deadline", place(deadline) - 5 * ratio, 12 * ratio); c.textAlign = "left";
}

// Probabilities of the classes: over time, a row each, and of the newest bin as a number and a bar.
const ROW = 24, LABELS = 170, MOST_CLASSES = 24;
export function classes(view) {
  const names = (S.state.classes || []).slice(0, MOST_CLASSES), last = view[view.length - 1];
  const [c, w, h, ratio] = context("classes", ROW * Math.max(1, names.length)), row = ROW * ratio, left = Math.min(LABELS * ratio, 0.45 * w);
  const count = span(), wide = (w - left) / count;
  names.forEach((name, k) => {
    const p = of(last.k, k), y = k * row, best = name === last.kn;
    c.fillStyle = css("--grid"); c.fillRect(left, y + 2 * ratio, w - left, row - 4 * ratio);
    c.fillStyle = TONES[0];
    for (const b of view) {
      const share = of(b.k, k);
      if (share === null) continue;
      c.globalAlpha = share; c.fillRect(left + (b.i - 1 - S.now + count) * wide, y + 2 * ratio, wide + 0.5, row - 4 * ratio);
    }
    c.globalAlpha = 0.25; c.fillRect(0, y + row - 5 * ratio, (left - 8 * ratio) * (p || 0), 3 * ratio); c.globalAlpha = 1;
    c.fillStyle = css(best ? "--ink" : "--soft");
    c.fillText(name, 0, y + row - 9 * ratio, left - 48 * ratio);
    c.textAlign = "right"; c.fillText(p === null ? "–" : p.toFixed(2), left - 8 * ratio, y + row - 9 * ratio); c.textAlign = "left";
  });
  const more = (S.state.classes || []).length - names.length;
  say(el("classes-note"), (last.kn ? "Answered: " + last.kn + "." : "No class is answered: none is probable enough.") + (more > 0 ? " " + more + " more are not shown." : ""));
}

export const scores = (view) => [OURS, ...rivals()].map((name) => [name, r2(view, (b) => (name === OURS ? b.y : b.decoders && b.decoders[name]))]);
