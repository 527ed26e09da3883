// Units: their spikes and expected rates, a row each.
import { S, context, css, el, info } from "./core.js";

// dark blue to yellow, even in lightness
const MAP = [[13, 22, 66], [30, 58, 128], [24, 104, 148], [32, 150, 139], [108, 190, 92], [214, 214, 60], [253, 236, 130]];
const LUT = Array.from({ length: 256 }, (_, v) => {
  const x = (v / 255) * (MAP.length - 1), k = Math.min(MAP.length - 2, Math.floor(x));
  return MAP[k].map((a, j) => Math.round(a + (x - k) * (MAP[k + 1][j] - a)));
});

const area = (name) => name.replace(/[-_. ]?\d+$/, "");
let order = [], ordered = "", drawnAt = 0;

function directions(n) { // of the velocity at which each unit fires most, by covariance with it
  const out = new Float64Array(2 * n), mean = new Float64Array(n);
  const known = S.bins.filter((b) => b.c && (b.truth || b.y)[0] !== null && b.c.length === n);
  known.forEach((b) => b.c.forEach((v, k) => (mean[k] += v / known.length)));
  for (const b of known) { const v = b.truth || b.y; for (let k = 0; k < n; k++) { out[2 * k] += (b.c[k] - mean[k]) * v[0]; out[2 * k + 1] += (b.c[k] - mean[k]) * v[1]; } }
  return Array.from({ length: n }, (_, k) => Math.atan2(out[2 * k + 1], out[2 * k]));
}

function sorted(n) {
  const by = el("sort").value, key = [by, n, S.session].join();
  if (key === ordered && performance.now() - drawnAt < 5000) return order;
  ordered = key; drawnAt = performance.now();
  const index = Array.from({ length: n }, (_, k) => k), names = S.state.unit_names;
  if (by === "rate") {
    const total = new Float64Array(n);
    S.bins.forEach((b) => { for (let k = 0; k < n; k++) total[k] += b.c ? b.c[k] : b.r[k]; });
    index.sort((a, b) => total[b] - total[a]);
  } else if (by === "area") index.sort((a, b) => area(names[a]).localeCompare(area(names[b])) || a - b);
  else if (by === "direction") { const d = directions(n); index.sort((a, b) => d[a] - d[b]); }
  return (order = index);
}

export function start() {
  el("sort").addEventListener("change", () => { ordered = ""; S.dirty = true; });
}

function image(id, w, h, paint) {
  const [c, cw, ch, ratio] = context(id);
  const small = image[id] || (image[id] = document.createElement("canvas"));
  if (small.width !== w || small.height !== h) { small.width = w; small.height = h; }
  const pixels = new ImageData(w, h);
  paint(new Uint32Array(pixels.data.buffer));
  small.getContext("2d").putImageData(pixels, 0, 0);
  c.imageSmoothingEnabled = false;
  if (cw > 0) c.drawImage(small, 0, 0, cw, ch);
  return [c, cw, ch, ratio];
}
const rgba = (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

export function draw(whole) {
  const n = whole[whole.length - 1].r.length, step = Math.max(1, Math.ceil(whole.length / 900));
  if (!n) return;
  const view = whole.filter((_, k) => k % step === 0), rows = sorted(n), names = S.state.unit_names;
  const flagged = new Map(((info() || {}).flagged || []).map((f) => [f.slice(0, f.lastIndexOf(":")), f.slice(f.lastIndexOf(":") + 1)]));
  const w = view.length, ink = css("--ink").match(/\w\w/g).map((x) => parseInt(x, 16));
  const masked = rows.map((k) => flagged.get(names[k]));
  const some = view.some((b) => b.c);
  el("raster-none").hidden = some;
  const [c, cw, ch, ratio] = image("raster", w, n, (out) => rows.forEach((k, row) => {
    for (let t = 0; t < w; t++) {
      const b = view[t];
      if (!b.c) { out[row * w + t] = b.status === "missing" ? rgba(139, 146, 156, 60) : 0; continue; }
      const off = masked[row] || (b.x && b.x.includes(k)), v = Math.min(255, b.c[k] * 90);
      out[row * w + t] = off ? rgba(201, 54, 54, 40 + v / 2) : v ? rgba(ink[0], ink[1], ink[2], 60 + 0.76 * v) : 0;
    }
  }));
  c.fillStyle = css("--bad"); c.textAlign = "right";
  masked.forEach((why, row) => {
    if (!why) return;
    const y = ((row + 0.5) / n) * ch;
    c.fillRect(0, y - ratio, 6 * ratio, 2 * ratio);
    if (flagged.size <= 8) c.fillText(names[rows[row]] + " " + why, cw - 4 * ratio, Math.max(10 * ratio, Math.min(ch - 3 * ratio, y + 4 * ratio)));
  });
  c.textAlign = "left";
  image("rates", w, n, (out) => rows.forEach((k, row) => {
    let top = 1e-9;
    for (const b of view) if (b.r[k] > top) top = b.r[k];
    for (let t = 0; t < w; t++) { const l = LUT[Math.max(0, Math.min(255, Math.round((255 * view[t].r[k]) / top)))]; out[row * w + t] = rgba(l[0], l[1], l[2], 255); }
  }));
  const list = [...flagged].map(([name, why]) => name + " (" + why + ")");
  el("masked").textContent = list.length ? "Masked: " + list.slice(0, 12).join(", ") + (list.length > 12 ? " and " + (list.length - 12) + " more" : "") : "No unit is masked.";
}
