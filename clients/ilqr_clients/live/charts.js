// Series over time.
import { OURS, S, STATUS, TONES, Z90, context, css, el, info, r2, rivals, tone, width } from "./core.js";

const charts = {};
const STAGES = [["queue", TONES[3]], ["solve", TONES[2]], ["publish", TONES[1]]];
const HEIGHT = 128, POINTS = 1200;
const quantity = (name, unit) => (unit ? name + " (" + unit + ")" : name);
const number = (v) => (v === null || v === undefined || !isFinite(v) ? "–" : Number(v.toPrecision(3)).toString());

function chart(place, title, lines, bands, height) {
  const axis = { stroke: () => css("--soft"), font: "11px system-ui", grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 } };
  const series = [{ label: "s" }].concat(lines.map((line) => ({
    label: line.name, stroke: line.tone, width: line.width === undefined ? 1.6 : line.width, dash: line.dash, points: { show: false }, value: (_, v) => number(v),
  })));
  return new uPlot({ width: Math.max(200, place.clientWidth), height: height || HEIGHT, series, bands: bands || [],
    scales: { x: { time: false } }, legend: { show: false }, cursor: { drag: { x: false, y: false } },
    axes: [{ ...axis, size: 24 }, { ...axis, size: 50, space: 24, label: title, labelSize: 16, labelFont: "11px system-ui" }] },
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
  const others = rivals(), truth = S.bins.some((b) => b.truth), m = (S.bins.findLast((b) => b.u) || { u: [] }).u.length;
  const key = JSON.stringify([S.state.names, S.state.units, S.state.bin_width, others, truth, Math.min(m, 4)]);
  if (key === built) return;
  built = key;
  for (const u of Object.values(charts).flat()) u.destroy();
  const ours = TONES[0], ink = "var(--ink)", tall = S.state.names.length < 3 ? 165 : HEIGHT;
  const known = truth ? [{ name: "truth", tone: () => css("--ink"), width: 1.4, dash: [4, 3] }] : [];
  charts.traces = S.state.names.slice(0, 3).map((name, d) => chart(el("traces"), quantity(name, S.state.units[d]), [
    { name: "from", tone: ours + "30", width: 0 }, { name: "to", tone: ours + "30", width: 0 }, { name: OURS, tone: ours, width: 2 },
    ...known, ...others.map((one) => ({ name: one, tone: tone(one, others), width: 1.2 }))], [{ series: [2, 1], fill: ours + "30" }], tall));
  legend("traces-legend", [[OURS + ", 90 % band", ours], ...(truth ? [["truth", ink, true]] : []), ...others.map((one) => [one, tone(one, others)])]);
  charts.latents = [chart(el("latents"), "a.u.", TONES.map((t, k) => ({ name: "no. " + (k + 1), tone: t })))];
  charts.inputs = m ? [chart(el("inputs"), "a.u.", TONES.slice(0, m).map((t, k) => ({ name: "input " + (k + 1), tone: t })))] : [];
  el("inputs-none").hidden = m > 0;
  charts.latency = [chart(el("latency"), "ms", [...STAGES.map(([name, t]) => ({ name, tone: t })), { name: "total", tone: ours, width: 2 }, { name: "deadline", tone: STATUS.late, dash: [6, 4] }])];
  legend("latency-legend", [...STAGES, ["total", ours], ["deadline", STATUS.late, true]]);
  charts.drift = [chart(el("drift"), "bits / spike", [{ name: "bits per spike, 5 s", tone: ours, width: 2 }, { name: "mean rates", tone: STATUS.late, dash: [6, 4] }])];
}

// The latents that vary most, their numbers kept over frames so that colours do not jump.
let order = [];
function ordered(view) {
  const n = view[0].z.length;
  if (order.length && order.n === n && S.frames % 60) return order;
  const spread = Array.from({ length: n }, (_, k) => {
    const m = view.reduce((s, b) => s + b.z[k], 0) / view.length;
    return [view.reduce((s, b) => s + (b.z[k] - m) ** 2, 0), k];
  });
  order = spread.sort((a, b) => b[0] - a[0]).slice(0, 4).map((x) => x[1]);
  order.n = n;
  return order;
}

// bits per spike of the last 5 s against the best 5 s there were
export function drift(all) {
  const values = running(all).slice(Math.round(5 / width())).filter((v) => v !== null);
  const best = Math.max(...values);
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

function thinned(whole) {
  const step = Math.max(1, Math.ceil(whole.length / POINTS)), thin = (values) => (step === 1 ? values : values.filter((_, k) => k % step === 0));
  const view = thin(whole), time = view.map((b) => b.i * width());
  const put = (u, columns) => {
    const room = Math.max(120, u.root.parentNode.clientWidth);
    if (u.width !== room) u.setSize({ width: room, height: u.height });
    u.setData([time, ...columns]);
  };
  return [view, put, thin];
}
const of = (values, d) => (values && values[d] !== undefined ? values[d] : null);

export function traces(whole) {
  const [view, put] = thinned(whole), names = rivals();
  charts.traces.forEach((u, d) => put(u, [
    ...[-1, 1, 0].map((k) => view.map((b) => (of(b.y, d) === null ? null : b.y[d] + k * Z90 * (b.s[d] || 0)))),
    ...(u.series.length > 4 + names.length ? [view.map((b) => of(b.truth, d))] : []),
    ...names.slice(0, u.series.length - 4).map((name) => view.map((b) => of(b.decoders && b.decoders[name], d)))]));
}

export function others(whole) {
  const [view, put, thin] = thinned(whole);
  const finite = view.filter((b) => b.z.every((v) => v !== null));
  if (finite.length > 2) { const which = ordered(finite); put(charts.latents[0], TONES.map((_, j) => view.map((b) => of(b.z, which[j])))); }
  charts.inputs.forEach((u) => put(u, u.series.slice(1).map((_, k) => view.map((b) => of(b.u, k)))));
  const deadline = info() ? info().deadline_ms : null;
  put(charts.latency[0], [...STAGES.map(([name]) => view.map((b) => b.ms[name])), view.map((b) => b.total), view.map(() => deadline)]);
  put(charts.drift[0], [thin(running(whole)), view.map(() => 0)]);
  statuses(view); spread(view, deadline);
}

function statuses(view) {
  const [c, w, h] = context("statuses");
  view.forEach((b, k) => { c.fillStyle = STATUS[b.status] || "#000"; c.fillRect((k / view.length) * w, 0, Math.ceil(w / view.length) + 1, h); });
}

function spread(view, deadline) {
  const [c, w, h, ratio] = context("spread");
  const values = view.map((b) => b.total).filter((v) => v > 0);
  if (!values.length) return;
  const low = Math.log10(Math.max(0.01, Math.min(...values) * 0.8)), high = Math.log10(Math.max(...values, deadline || 0) * 1.3), cells = 60, foot = 15 * ratio;
  const counts = Array(cells).fill(0);
  values.forEach((v) => (counts[Math.min(cells - 1, Math.max(0, Math.floor(((Math.log10(v) - low) / (high - low)) * cells)))] += 1));
  const top = Math.max(...counts);
  c.fillStyle = TONES[0];
  counts.forEach((n, k) => c.fillRect((k / cells) * w, h - foot - (n / top) * (h - foot - 2), w / cells - 1, (n / top) * (h - foot - 2)));
  c.fillStyle = css("--soft");
  const label = (v) => (v < 1 ? v.toFixed(2) : v.toFixed(0)) + " ms";
  c.fillText(label(10 ** low), 0, h - 3 * ratio);
  c.textAlign = "right"; c.fillText(label(10 ** high), w, h - 3 * ratio); c.textAlign = "left";
  if (!deadline) return;
  const x = ((Math.log10(deadline) - low) / (high - low)) * w;
  c.fillStyle = STATUS.late; c.fillRect(x - ratio, 0, 2 * ratio, h - foot);
  c.textAlign = "right"; c.fillText("deadline", x - 5 * ratio, 12 * ratio); c.textAlign = "left";
}

export const scores = (view) => [OURS, ...rivals()].map((name) => [name, r2(view, (b) => (name === OURS ? b.y : b.decoders && b.decoders[name]))]);
export { number };
