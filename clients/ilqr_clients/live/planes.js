// Places: the cursor, the decoded plane with its ellipse, and the latents turning in three dimensions.
import { OURS, RADIUS90, S, TONES, context, css, el, rivals, say, tone, touch, width } from "./core.js";

const TRAIL_S = 2.5, FADE_S = 2.0, AHEAD_S = 0.1, MOST = 120, LEVELS = 12; // points of a trail, and shades of it
const reach = {}; // how far a canvas shows, which shrinks slowly, so that it does not jump

function frame(id, points, least) {
  const [c, w, h, ratio] = context(id);
  let far = least;
  for (const p of points) if (p) far = Math.max(far, Math.abs(p[0]), Math.abs(p[1]));
  reach[id] = Math.max(far, (reach[id] || 0) * 0.995);
  const half = Math.min(w, h) / 2 - 12 * ratio;
  if (half <= 0) return null; // a canvas has next to no size while the page is laid out
  const scale = half / (1.1 * reach[id]);
  return { c, w, h, ratio, scale, X: (x) => w / 2 + x * scale, Y: (y) => h / 2 - y * scale };
}

function axes(f, labels) {
  const { c, w, h, ratio, X, Y } = f;
  c.strokeStyle = css("--grid"); c.lineWidth = ratio;
  c.beginPath(); c.moveTo(X(0), 0); c.lineTo(X(0), h); c.moveTo(0, Y(0)); c.lineTo(w, Y(0)); c.stroke();
  c.fillStyle = css("--soft");
  c.fillText(labels[1], X(0) + 5 * ratio, 12 * ratio);
  c.textAlign = "right"; c.fillText(labels[0], w - 4 * ratio, Y(0) - 5 * ratio); c.textAlign = "left";
}

// At most MOST of the points, always the same ones while the trail moves on, and the newest.
function few(points, first) {
  const step = Math.ceil(points.length / MOST);
  return step === 1 ? points : points.filter((_, k) => (first + k) % step === 0 || k === points.length - 1);
}

// The points as lines in a few shades, each drawn at once: style(share of the way, from 0 to 1) sets it.
function shades(f, points, style) {
  const { c, X, Y } = f, n = points.length - 1, levels = Math.min(LEVELS, n);
  for (let level = 0; level < levels; level++) {
    const from = Math.round((level * n) / levels), to = Math.round(((level + 1) * n) / levels);
    style((level + 1) / levels, points[to]);
    c.beginPath(); c.moveTo(X(points[from][0]), Y(points[from][1]));
    for (let k = from + 1; k <= to; k++) c.lineTo(X(points[k][0]), Y(points[k][1]));
    c.stroke();
  }
  c.globalAlpha = 1;
}

function trail(f, points, colour, size, dash) {
  const { c, ratio } = f, known = points.filter((p) => p && p[0] !== null && p[1] !== null);
  c.strokeStyle = colour; c.lineWidth = size * ratio; c.lineCap = dash ? "butt" : "round"; c.setLineDash(dash ? [3 * ratio, 4 * ratio] : []);
  shades(f, known, (share) => (c.globalAlpha = 0.04 + 0.9 * share ** 2));
  c.setLineDash([]);
  return known[known.length - 1];
}

function dot(f, at, colour, radius, ring) {
  if (!at) return;
  const { c, ratio, X, Y } = f;
  c.beginPath(); c.arc(X(at[0]), Y(at[1]), radius * ratio, 0, 7);
  if (ring) { c.strokeStyle = colour; c.lineWidth = 2 * ratio; c.stroke(); } else { c.fillStyle = colour; c.fill(); }
}

function ellipse({ c, X, Y, scale }, at, std) { // that holds 90 %
  c.globalAlpha = 0.18; c.fillStyle = TONES[0];
  c.beginPath(); c.ellipse(X(at[0]), Y(at[1]), RADIUS90 * std[0] * scale, RADIUS90 * std[1] * scale, 0, 0, 7); c.fill();
  c.globalAlpha = 1;
}

const bins = (seconds) => Math.max(2, Math.round(seconds / width()));

export function decoded(view) {
  const names = S.state.names, others = rivals(), cut = view.slice(-bins(TRAIL_S)), recent = few(cut, Math.ceil(cut[0].i));
  const last = recent[recent.length - 1];
  const ys = recent.map((b) => b.y), truths = recent.map((b) => b.truth);
  const f = frame("plane", [...ys, ...truths], 1e-6);
  if (!f) return;
  axes(f, names.slice(0, 2).map((n, d) => n + (S.state.units[d] ? " (" + S.state.units[d] + ")" : "")));
  if (last.s[0] && last.y[0] !== null) ellipse(f, last.y, last.s);
  others.forEach((name) => dot(f, trail(f, recent.map((b) => b.decoders && b.decoders[name]), tone(name, others), 1.2), tone(name, others), 3.5));
  dot(f, trail(f, truths, css("--ink"), 1.4, true), css("--ink"), 5, true);
  dot(f, trail(f, ys, TONES[0], 2.2), TONES[0], 5);
}

// Where a decoder's velocity leads. In a closed loop from where the cursor was; else with a slow pull
// to the middle, the same for all, since a recording's velocity says nothing of where it began.
function path(recent, values, start) {
  const at = start ? [...start] : [0, 0];
  return recent.map((b, n) => {
    const v = values(b), dt = width() * (n ? Math.min(1, b.i - recent[n - 1].i) : 1), keep = start ? 1 : Math.exp(-dt / FADE_S);
    if (v && v[0] !== null && v[1] !== null) { at[0] = keep * at[0] + dt * v[0]; at[1] = keep * at[1] + dt * v[1]; }
    return [at[0], at[1]];
  });
}

export function hasCursor(view) {
  const units = S.state.units;
  return view.some((b) => b.cursor) || (units.length >= 2 && units.slice(0, 2).every((u) => u.endsWith("/s")));
}

export function cursor(view) {
  const others = rivals(), closed = view.some((b) => b.cursor), n = bins(TRAIL_S), now = view[view.length - 1];
  const recent = closed ? view.slice(-Math.round(n / 2)) : view.slice(-3 * n), start = closed ? (recent[0] || {}).cursor : null;
  const first = Math.max(0, recent.length - n), at = Math.ceil((recent[first] || now).i);
  const cut = (values) => few(path(recent, values, start).slice(-n), at);
  const ours = cut((b) => b.y), truth = S.truth ? cut((b) => b.truth) : [], moved = closed ? few(view.slice(-n).map((b) => b.cursor), at) : [];
  const paths = others.map((name) => cut((b) => b.decoders && b.decoders[name]));
  const f = frame("cursor", closed ? [[0.13, 0.13], ...moved] : [...ours, ...truth], 1e-6);
  if (!f) return;
  const unit = (S.state.units[0] || "").replace(/\/s$/, "");
  axes(f, closed ? ["x (m)", "y (m)"] : ["x (" + unit + ")", "y (" + unit + ")"]);
  const last = recent.findLast((b) => b.target); // what is true of the newest bin may not have come
  if (closed && last) {
    const { c, X, Y, scale } = f, tint = last.go ? "#2fa36b" : css("--soft");
    c.globalAlpha = last.go ? 0.3 : 0.15; c.fillStyle = tint; c.beginPath(); c.arc(X(last.target[0]), Y(last.target[1]), (last.radius || 0.02) * scale, 0, 7); c.fill();
    c.globalAlpha = 1; c.strokeStyle = tint; c.lineWidth = 2 * f.ratio; c.stroke();
  }
  paths.forEach((points, k) => dot(f, trail(f, points, tone(others[k], others), 1.4), tone(others[k], others), 4));
  if (truth.length) dot(f, trail(f, truth, css("--ink"), 1.4, true), css("--ink"), 6, true);
  const tip = trail(f, ours, TONES[0], 2.2), place = closed ? moved.findLast((p) => p) : tip;
  if (place && now.s[0] && now.y[0] !== null) ellipse(f, [0, 1].map((d) => place[d] + AHEAD_S * now.y[d]), [0, 1].map((d) => AHEAD_S * now.s[d]));
  dot(f, tip, TONES[0], 5);
  if (closed) dot(f, trail(f, moved, css("--bad"), 2.6), css("--bad"), 6);
  say(el("cursor-note"), closed
    ? "Red: the cursor. The others: where each decoder alone would have taken it in the last " + (TRAIL_S / 2).toFixed(1) + " s; dotted, where the subject meant to go. Shaded: where it leads in " + 1e3 * AHEAD_S + " ms, 90 % ellipse."
    : "Decoded velocity summed up, the same way for all: blue " + OURS + (others.length ? ", " + others.join(", ") : "") + (S.truth ? "; ring, the truth" : "") + ". Shaded: where it leads in the next " + 1e3 * AHEAD_S + " ms, 90 % ellipse.");
}

// First three principal directions by power iteration on the covariance; each starts from the last.
let directions = [], home = null, found = 0;
function principal(rows) {
  const n = rows[0].length, mean = Array(n).fill(0);
  rows.forEach((r) => r.forEach((v, k) => (mean[k] += v / rows.length)));
  const centred = rows.map((r) => r.map((v, k) => v - mean[k])), next = Array(n), axes = [];
  for (let a = 0; a < Math.min(3, n); a++) {
    let v = (directions[a] && directions[a].length === n && directions[a]) || Array.from({ length: n }, (_, k) => 1 / (1 + ((k + a) % n)));
    for (let turn = 0; turn < 4; turn++) {
      next.fill(0);
      for (const r of centred) { let s = 0; for (let k = 0; k < n; k++) s += r[k] * v[k]; for (let k = 0; k < n; k++) next[k] += s * r[k]; }
      for (const before of axes) { let s = 0; for (let k = 0; k < n; k++) s += next[k] * before[k]; for (let k = 0; k < n; k++) next[k] -= s * before[k]; }
      const size = Math.hypot(...next) || 1;
      v = next.map((x) => x / size);
    }
    axes.push(v);
  }
  directions = axes; home = mean;
}

const turn = { yaw: 0.6, pitch: 0.45, held: false, still: matchMedia("(prefers-reduced-motion: reduce)").matches, at: 0 };
export function latents(view) {
  const size = view[view.length - 1].z.length, now = performance.now();
  const rows = view.slice(-bins(30)).filter((b) => b.z.length === size && b.z.every((v) => v !== null));
  if (rows.length < 3) return;
  if (!home || home.length !== size || now - found > 1000) { found = now; const step = Math.ceil(rows.length / 200); principal(rows.filter((_, k) => k % step === 0).map((b) => b.z)); }
  const recent = rows.slice(-bins(6));
  const points = few(recent, Math.ceil(recent[0].i)).map(({ z }) => {
    const p = directions.map((v) => v.reduce((s, x, k) => s + x * (z[k] - home[k]), 0));
    return [p[0] || 0, p[1] || 0, p[2] || 0];
  });
  if (!turn.held && !turn.still && !S.paused) turn.yaw += 0.00018 * Math.min(100, now - turn.at);
  turn.at = now;
  const cy = Math.cos(turn.yaw), sy = Math.sin(turn.yaw), cp = Math.cos(turn.pitch), sp = Math.sin(turn.pitch);
  const seen = ([x, y, z]) => { const a = cy * x + sy * z, b = -sy * x + cy * z; return [a, cp * y - sp * b, sp * y + cp * b]; };
  const flat = points.map(seen), far = Math.max(1e-6, ...points.map((p) => Math.hypot(...p)));
  const f = frame("pca", [[far, far]], 1e-6);
  if (!f) return;
  const { c, ratio, X, Y } = f;
  c.strokeStyle = css("--grid"); c.fillStyle = css("--soft"); c.lineWidth = 1.5 * ratio;
  [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((axis, k) => {
    const a = seen(axis.map((v) => -0.8 * v * reach.pca)), b = seen(axis.map((v) => 0.8 * v * reach.pca));
    c.beginPath(); c.moveTo(X(a[0]), Y(a[1])); c.lineTo(X(b[0]), Y(b[1])); c.stroke();
    c.fillText("PC " + (k + 1), X(b[0]) + 3 * ratio, Y(b[1]) - 3 * ratio);
  });
  c.lineCap = "round";
  shades(f, flat, (share, at) => {
    const near = 0.5 + 0.5 * Math.max(-1, Math.min(1, at[2] / far));
    c.strokeStyle = "hsl(" + (265 - 55 * share) + " 75% " + (48 + 14 * near) + "%)"; c.globalAlpha = 0.06 + 0.94 * share * share; c.lineWidth = (1 + 2 * near) * ratio;
  });
  dot(f, flat[flat.length - 1], TONES[0], 5);
}

export const turned = () => [turn.yaw, turn.pitch];

export function start() {
  const canvas = el("pca");
  let from = null;
  canvas.addEventListener("pointerdown", (e) => { from = [e.clientX, e.clientY]; turn.held = true; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointermove", (e) => {
    if (!from) return;
    turn.yaw += (e.clientX - from[0]) / 120; turn.pitch = Math.max(-1.5, Math.min(1.5, turn.pitch + (e.clientY - from[1]) / 120));
    from = [e.clientX, e.clientY]; touch();
  });
  const drop = () => { from = null; turn.held = false; };
  canvas.addEventListener("pointerup", drop); canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] }[e.key];
    if (!by) return;
    e.preventDefault(); turn.still = true; turn.yaw += by[0]; turn.pitch = Math.max(-1.5, Math.min(1.5, turn.pitch + by[1])); touch();
  });
}
