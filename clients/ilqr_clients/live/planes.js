// Places: the cursor, the decoded plane with its ellipse, and the latents turning in three dimensions.
import { OURS, RADIUS90, S, TONES, context, css, el, rivals, tone, width } from "./core.js";

const TRAIL_S = 2.5, FADE_S = 2.0;
const reach = {}; // how far a canvas shows, which shrinks slowly, so that it does not jump

function frame(id, points, least) {
  const [c, w, h, ratio] = context(id);
  const far = Math.max(least, ...points.flatMap((p) => (p ? [Math.abs(p[0]), Math.abs(p[1])] : [0])));
  reach[id] = Math.max(far, (reach[id] || 0) * 0.995);
  const room = Math.min(w, h) / 2 - 12 * ratio;
  if (room <= 0) return null; // a canvas has next to no size while the page is laid out
  const scale = room / (1.1 * reach[id]);
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

function trail(f, points, colour, size, dash) {
  const { c, ratio, X, Y } = f, known = points.filter((p) => p && p[0] !== null && p[1] !== null);
  c.strokeStyle = colour; c.lineWidth = size * ratio; c.lineCap = "round"; c.setLineDash(dash ? [3 * ratio, 4 * ratio] : []);
  for (let k = 1; k < known.length; k++) {
    c.globalAlpha = 0.04 + 0.9 * (k / known.length) ** 2;
    c.beginPath(); c.moveTo(X(known[k - 1][0]), Y(known[k - 1][1])); c.lineTo(X(known[k][0]), Y(known[k][1])); c.stroke();
  }
  c.globalAlpha = 1; c.setLineDash([]);
  return known[known.length - 1];
}

function dot(f, at, colour, radius, ring) {
  if (!at) return;
  const { c, ratio, X, Y } = f;
  c.beginPath(); c.arc(X(at[0]), Y(at[1]), radius * ratio, 0, 7);
  if (ring) { c.strokeStyle = colour; c.lineWidth = 2 * ratio; c.stroke(); } else { c.fillStyle = colour; c.fill(); }
}

export function decoded(view) {
  const names = S.state.names, others = rivals(), recent = view.slice(-Math.max(2, Math.round(TRAIL_S / width())));
  const last = recent[recent.length - 1];
  const ys = recent.map((b) => b.y), truths = recent.map((b) => b.truth);
  const f = frame("plane", [...ys, ...truths], 1e-6);
  if (!f) return;
  axes(f, names.slice(0, 2).map((n, d) => n + (S.state.units[d] ? " (" + S.state.units[d] + ")" : "")));
  if (last.s[0] && last.y[0] !== null) {
    f.c.globalAlpha = 0.18; f.c.fillStyle = TONES[0];
    f.c.beginPath(); f.c.ellipse(f.X(last.y[0]), f.Y(last.y[1]), RADIUS90 * last.s[0] * f.scale, RADIUS90 * last.s[1] * f.scale, 0, 0, 7); f.c.fill();
    f.c.globalAlpha = 1;
  }
  others.forEach((name) => dot(f, trail(f, recent.map((b) => b.decoders && b.decoders[name]), tone(name, others), 1.2), tone(name, others), 3.5));
  dot(f, trail(f, truths, css("--ink"), 1.4, true), css("--ink"), 5, true);
  dot(f, trail(f, ys, TONES[0], 2.2), TONES[0], 5);
}

// Where a decoder's velocity leads. In a closed loop from where the cursor was; else with a slow pull
// to the middle, the same for all, since a recording's velocity says nothing of where it began.
function path(recent, values, start) {
  const dt = width(), keep = start ? 1 : Math.exp(-dt / FADE_S), at = start ? [...start] : [0, 0], out = [];
  for (const b of recent) {
    const v = values(b);
    if (v && v[0] !== null && v[1] !== null) { at[0] = keep * at[0] + dt * v[0]; at[1] = keep * at[1] + dt * v[1]; }
    out.push([at[0], at[1]]);
  }
  return out;
}

export function cursor(view) {
  const place = el("cursor-card"), others = rivals(), closed = view.some((b) => b.cursor);
  const velocity = S.state.units.length >= 2 && S.state.units.slice(0, 2).every((u) => u.endsWith("/s"));
  place.hidden = !(closed || velocity);
  if (place.hidden) return;
  const n = Math.max(2, Math.round(TRAIL_S / width()));
  const recent = closed ? view.slice(-Math.round(n / 2)) : view.slice(-3 * n), start = closed ? (recent[0] || {}).cursor : null;
  const cut = (points) => points.slice(-n);
  const ours = cut(path(recent, (b) => b.y, start)), truth = cut(path(recent, (b) => b.truth, start));
  const paths = others.map((name) => cut(path(recent, (b) => b.decoders && b.decoders[name], start)));
  const f = frame("cursor", closed ? [[0.13, 0.13], ...view.slice(-n).map((b) => b.cursor)] : [...ours, ...truth], 1e-6);
  if (!f) return;
  const unit = S.state.units[0].replace(/\/s$/, "");
  axes(f, closed ? ["x (m)", "y (m)"] : ["x (" + unit + ")", "y (" + unit + ")"]);
  const last = recent.findLast((b) => b.target); // what is true of the newest bin may not have come
  if (closed && last) {
    const { c, X, Y, scale } = f, tint = last.go ? "#2fa36b" : css("--soft");
    c.globalAlpha = last.go ? 0.3 : 0.15; c.fillStyle = tint; c.beginPath(); c.arc(X(last.target[0]), Y(last.target[1]), (last.radius || 0.02) * scale, 0, 7); c.fill();
    c.globalAlpha = 1; c.strokeStyle = tint; c.lineWidth = 2 * f.ratio; c.stroke();
  }
  paths.forEach((points, k) => dot(f, trail(f, points, tone(others[k], others), 1.4), tone(others[k], others), 4));
  if (recent.some((b) => b.truth)) dot(f, trail(f, truth, css("--ink"), 1.4, true), css("--ink"), 6, true);
  dot(f, trail(f, ours, TONES[0], 2.2), TONES[0], 5);
  if (closed) dot(f, trail(f, view.slice(-n).map((b) => b.cursor), css("--bad"), 2.6), css("--bad"), 6);
  el("cursor-note").textContent = closed
    ? "Red: the cursor. The others: where each decoder alone would have taken it in the last " + (TRAIL_S / 2).toFixed(1) + " s; dotted, where the subject meant to go."
    : "Decoded velocity summed up, the same way for all: blue " + OURS + (others.length ? ", " + others.join(", ") : "") + "; ring, the truth.";
}

// First three principal directions by power iteration on the covariance; each starts from the last.
let directions = [], home = null;
function principal(rows) {
  const n = rows[0].length, mean = Array(n).fill(0);
  rows.forEach((r) => r.forEach((v, k) => (mean[k] += v / rows.length)));
  const centred = rows.map((r) => r.map((v, k) => v - mean[k]));
  const found = [];
  for (let a = 0; a < Math.min(3, n); a++) {
    let v = (directions[a] && directions[a].length === n && directions[a]) || Array.from({ length: n }, (_, k) => 1 / (1 + ((k + a) % n)));
    for (let turn = 0; turn < 6; turn++) {
      const next = Array(n).fill(0);
      for (const r of centred) { let s = 0; for (let k = 0; k < n; k++) s += r[k] * v[k]; for (let k = 0; k < n; k++) next[k] += s * r[k]; }
      for (const before of found) { let s = 0; for (let k = 0; k < n; k++) s += next[k] * before[k]; for (let k = 0; k < n; k++) next[k] -= s * before[k]; }
      const size = Math.hypot(...next) || 1;
      v = next.map((x) => x / size);
    }
    found.push(v);
  }
  directions = found; home = mean;
}

const turn = { yaw: 0.6, pitch: 0.45, held: false, still: matchMedia("(prefers-reduced-motion: reduce)").matches };
export function latents(view) {
  const rows = view.slice(-Math.round(30 / width())).filter((b) => b.z.every((v) => v !== null)).map((b) => b.z);
  if (rows.length < 3) return;
  if (!home || home.length !== rows[0].length || S.frames % 30 === 0) principal(rows);
  const points = rows.slice(-Math.round(6 / width())).map((r) => {
    const p = directions.map((v) => v.reduce((s, x, k) => s + x * (r[k] - home[k]), 0));
    return [p[0] || 0, p[1] || 0, p[2] || 0];
  });
  const cy = Math.cos(turn.yaw), sy = Math.sin(turn.yaw), cp = Math.cos(turn.pitch), sp = Math.sin(turn.pitch);
  const view2 = ([x, y, z]) => { const a = cy * x + sy * z, b = -sy * x + cy * z; return [a, cp * y - sp * b, sp * y + cp * b]; };
  const flat = points.map(view2), far = Math.max(1e-6, ...points.map((p) => Math.hypot(...p)));
  const f = frame("pca", [[far, far]], 1e-6);
  if (!f) return;
  const { c, ratio, X, Y } = f;
  c.strokeStyle = css("--grid"); c.fillStyle = css("--soft"); c.lineWidth = 1.5 * ratio;
  [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((axis, k) => {
    const a = view2(axis.map((v) => -0.8 * v * reach.pca)), b = view2(axis.map((v) => 0.8 * v * reach.pca));
    c.beginPath(); c.moveTo(X(a[0]), Y(a[1])); c.lineTo(X(b[0]), Y(b[1])); c.stroke();
    c.fillText("PC " + (k + 1), X(b[0]) + 3 * ratio, Y(b[1]) - 3 * ratio);
  });
  for (let k = 1; k < flat.length; k++) {
    const near = 0.5 + 0.5 * Math.max(-1, Math.min(1, flat[k][2] / far)), age = k / flat.length;
    c.strokeStyle = "hsl(" + (265 - 55 * age) + " 75% " + (48 + 14 * near) + "%)"; c.globalAlpha = 0.06 + 0.94 * age * age; c.lineWidth = (1 + 2 * near) * ratio;
    c.beginPath(); c.moveTo(X(flat[k - 1][0]), Y(flat[k - 1][1])); c.lineTo(X(flat[k][0]), Y(flat[k][1])); c.stroke();
  }
  c.globalAlpha = 1;
  dot(f, flat[flat.length - 1], TONES[0], 5);
  if (!turn.held && !turn.still && !S.paused) turn.yaw += 0.006;
}

export const turned = () => [turn.yaw, turn.pitch];

export function start() {
  const canvas = el("pca");
  let from = null;
  canvas.addEventListener("pointerdown", (e) => { from = [e.clientX, e.clientY]; turn.held = true; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointermove", (e) => {
    if (!from) return;
    turn.yaw += (e.clientX - from[0]) / 120; turn.pitch = Math.max(-1.5, Math.min(1.5, turn.pitch + (e.clientY - from[1]) / 120));
    from = [e.clientX, e.clientY]; S.dirty = true;
  });
  const drop = () => { from = null; turn.held = false; };
  canvas.addEventListener("pointerup", drop); canvas.addEventListener("pointercancel", drop);
  canvas.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] }[e.key];
    if (!by) return;
    e.preventDefault(); turn.still = true; turn.yaw += by[0]; turn.pitch = Math.max(-1.5, Math.min(1.5, turn.pitch + by[1])); S.dirty = true;
  });
}
