// Units: their spikes and expected rates, a row each.
import { S, context, css, el, info, say, span, touch } from "./core.js";

// dark blue to yellow, even in lightness
const MAP = [[13, 22, 66], [30, 58, 128], [24, 104, 148], [32, 150, 139], [108, 190, 92], [214, 214, 60], [253, 236, 130]];
const LUT = Array.from({ length: 256 }, (_, v) => {
  const x = (v / 255) * (MAP.length - 1), k = Math.min(MAP.length - 2, Math.floor(x));
  return MAP[k].map((a, j) => Math.round(a + (x - k) * (MAP[k + 1][j] - a)));
});

const COLUMNS = 900;
const area = (name) => (name || "").replace(/[-_. ]?\d+$/, "");
let order = [], ordered = "", drawnAt = 0;

function directions(n) { // of the velocity at which each unit fires most, by covariance with it
  const out = new Float64Array(2 * n), mean = new Float64Array(n);
  const known = S.bins.filter((b) => b.c && b.c.length === n && (b.truth || b.y).length > 1 && (b.truth || b.y)[0] !== null);
  known.forEach((b) => b.c.forEach((v, k) => (mean[k] += v / known.length)));
  for (const b of known) { const v = b.truth || b.y; for (let k = 0; k < n; k++) { out[2 * k] += (b.c[k] - mean[k]) * v[0]; out[2 * k + 1] += (b.c[k] - mean[k]) * v[1]; } }
  return Array.from({ length: n }, (_, k) => Math.atan2(out[2 * k + 1], out[2 * k]));
}

function sorted(n) {
  const by = el("sort").value, names = S.state.unit_names, key = [by, n, names.length, S.session].join();
  if (key === ordered && performance.now() - drawnAt < 5000) return order;
  ordered = key; drawnAt = performance.now();
  const index = Array.from({ length: n }, (_, k) => k);
  if (by === "rate") {
    const total = new Float64Array(n);
    S.bins.forEach((b) => { if (b.r.length === n) for (let k = 0; k < n; k++) total[k] += b.c ? b.c[k] : b.r[k]; });
    index.sort((a, b) => total[b] - total[a]);
  } else if (by === "area") index.sort((a, b) => area(names[a]).localeCompare(area(names[b])) || a - b);
  else if (by === "direction") { const d = directions(n); index.sort((a, b) => d[a] - d[b]); }
  return (order = index);
}

export function start() {
  el("sort").addEventListener("change", () => { ordered = ""; touch(); });
}

// Pixels, a row a unit and a column a bin or a few, drawn as large as the canvas is.
function image(id, w, h, paint) {
  const [c, cw, ch, ratio] = context(id);
  const small = image[id] || (image[id] = document.createElement("canvas"));
  if (small.width !== w || small.height !== h || !small.pixels) { small.width = w; small.height = h; small.pixels = new ImageData(w, h); }
  const out = new Uint32Array(small.pixels.data.buffer);
  out.fill(0);
  paint(out);
  small.getContext("2d").putImageData(small.pixels, 0, 0);
  c.imageSmoothingEnabled = h > ch; // or rows would be left out
  if (cw > 0) c.drawImage(small, 0, 0, cw, ch);
  return [c, cw, ch, ratio];
}
const rgba = (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;
const BLUES = LUT.map((l) => rgba(l[0], l[1], l[2], 255));

// The bins of each column, which keep it while time goes on.
function columns(view, n) {
  const count = span(), per = Math.max(1, Math.ceil(count / COLUMNS)), w = Math.ceil(count / per), last = Math.floor(S.now / per);
  const placed = [];
  for (const b of view) {
    const x = w - 1 - last + Math.floor(b.i / per);
    if (x >= 0 && x < w && b.r.length === n) placed.push([x, b]);
  }
  return [w, placed];
}

export function raster(view) {
  const n = view[view.length - 1].r.length;
  if (!n) return;
  const rows = sorted(n), names = S.state.unit_names, [w, placed] = columns(view, n);
  const flagged = new Map(((info() || {}).flagged || []).map((f) => [f.slice(0, f.lastIndexOf(":")), f.slice(f.lastIndexOf(":") + 1)]));
  const ink = css("--ink").match(/\w\w/g).map((x) => parseInt(x, 16)), masked = rows.map((k) => flagged.get(names[k]));
  el("raster-none").hidden = view.some((b) => b.c);
  const [c, cw, ch, ratio] = image("raster", w, n, (out) => {
    for (const [x, b] of placed) {
      const unused = b.x && b.x.length ? new Set(b.x) : null;
      rows.forEach((k, row) => {
        const at = row * w + x, v = b.c ? Math.min(255, b.c[k] * 90) : 0;
        if (!b.c) out[at] = out[at] || (b.status === "missing" ? rgba(139, 146, 156, 60) : 0);
        else if (masked[row] || (unused && unused.has(k))) out[at] = Math.max(out[at], rgba(201, 54, 54, 40 + v / 2));
        else if (v) out[at] = Math.max(out[at], rgba(ink[0], ink[1], ink[2], 60 + 0.76 * v));
      });
    }
  });
  c.fillStyle = css("--bad"); c.textAlign = "right";
  masked.forEach((why, row) => {
    if (!why) return;
    const y = ((row + 0.5) / n) * ch;
    c.fillRect(0, y - ratio, 6 * ratio, 2 * ratio);
    if (flagged.size <= 8) c.fillText(names[rows[row]] + " " + why, cw - 4 * ratio, Math.max(10 * ratio, Math.min(ch - 3 * ratio, y + 4 * ratio)));
  });
  c.textAlign = "left";
  const list = [...flagged].map(([name, why]) => name + " (" + why + ")"), all = S.state.all_units || n;
  say(el("masked"), (list.length ? "Masked: " + list.slice(0, 12).join(", ") + (list.length > 12 ? " and " + (list.length - 12) + " more" : "") : "No unit is masked.") +
    (all > n ? " The first " + n + " of " + all + " units are shown." : ""));
}

export function rates(view) {
  const n = view[view.length - 1].r.length;
  if (!n) return;
  const rows = sorted(n), [w, placed] = columns(view, n);
  image("rates", w, n, (out) => rows.forEach((k, row) => {
    let top = 1e-9;
    for (const [, b] of placed) if (b.r[k] > top) top = b.r[k];
    for (const [x, b] of placed) out[row * w + x] = BLUES[Math.max(0, Math.min(255, Math.round((255 * b.r[k]) / top)))];
  }));
}
