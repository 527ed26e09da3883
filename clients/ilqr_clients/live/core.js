// What has come of one session, the stream it comes by, and the moment that is drawn.
export const Z90 = 1.6448536269514722, RADIUS90 = 2.145966026289347;
export const OURS = "iLQR-VAE";
export const TONES = ["#2f7fe6", "#e0832a", "#2fa36b", "#9a6be0"];
export const STATUS = { ok: "#2fa36b", degraded: "#e0832a", late: "#dd4b4b", missing: "#8b929c", extrapolated: "#9a6be0" };
const OTHERS = ["#9a6be0", "#e0832a", "#2fa36b", "#c2497f"];
const MOST_S = 300, MOST = 24000, MOST_NUMBERS = 8e6, EARLY = 2000; // bins kept: seconds, number, units in all of them; facts that wait for their bin
const BACKLOG = 200; // entries in one message: so many are not the pace of the session

const found = new Map();
export const el = (id) => found.get(id) || found.set(id, document.getElementById(id)).get(id);
export const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };

let theme = {};
export const css = (name) => (theme[name] ??= getComputedStyle(document.documentElement).getPropertyValue(name).trim());
export const repaint = () => { theme = {}; touch(); };

// truth, inputs, others: what the bins have had so far; now: the time that is drawn, in bins.
export const S = { state: null, session: "", bins: [], paused: false, frozen: [], dirty: true, frames: 0, truth: false, inputs: 0, others: [], now: 0 };
export const info = () => S.state && S.state.sessions.find((s) => s.session === S.session);
export const width = () => (S.state && S.state.bin_width) || 0.05;
export const span = () => Math.max(2, Math.round(Number(el("span").value) / width()));
export const rivals = () => S.others;
export const tone = (name, names) => (name === OURS ? TONES[0] : OTHERS[names.indexOf(name) % OTHERS.length]);

const token = new URLSearchParams(location.search).get("token");
export function address(path, more) {
  const query = new URLSearchParams(more || {});
  if (token) query.set("token", token);
  return path + (query.size ? "?" + query : "");
}

let source = null, at = new Map(), early = new Map(), hooks = {}, alarmed = 0;

export function touch() { // something is to be drawn
  S.dirty = true;
  if (hooks.wake) hooks.wake();
}

// The moment that is drawn follows the newest bin by the clock, a little behind it, so that all moves
// evenly whatever the rate of bins and of messages.
let pace = [], head = -1, ticked = 0;
function arrived(entries, now) {
  const newest = S.bins[S.bins.length - 1].i, last = pace[pace.length - 1];
  if (entries >= BACKLOG || (last && now - last[0] > 1000)) pace = [];
  pace.push([now, newest]);
  while (pace.length > 2 && now - pace[0][0] > 2000) pace.shift();
}

export function advance(now) { // true if it has moved
  const last = S.bins[S.bins.length - 1], before = head, dt = Math.min(0.25, Math.max(0, now - ticked) / 1e3);
  ticked = now;
  if (!last) return false;
  const first = pace[0], end = pace[pace.length - 1];
  const rate = first && end[0] > first[0] ? Math.max(0, (1e3 * (end[1] - first[1])) / (end[0] - first[0])) : 0;
  const lag = 1 + 0.05 * rate, behind = last.i - head;
  if (!rate || behind < 0 || behind > 4 * lag + rate / 2) head = rate ? Math.max(last.i - lag, S.bins[0].i) : last.i;
  else head = Math.min(last.i, head + dt * rate * Math.max(0.25, Math.min(2, 1 + (behind - lag) / (2 * lag))));
  return head !== before;
}

// The bins that are shown, as they came.
export function slice() {
  const all = S.paused ? S.frozen : S.bins, count = span(), most = Math.max(0, (all.length - count) * width()), back = el("back");
  const max = String(Math.floor(most));
  let end = all.length;
  if (back.max !== max) back.max = max;
  if (S.paused) end -= Math.round(Math.min(Number(back.value), most) / width());
  else while (end > 1 && all[end - 2].i >= head) end -= 1;
  return all.slice(Math.max(0, end - count - 1), end);
}

const mean = (a, b, p) => (a && b && a.length === b.length ? a.map((x, k) => (x === null || b[k] === null ? null : x + p * (b[k] - x))) : b);

// The same with the last one moved to the moment that is drawn.
export function shown() {
  const view = slice(), n = view.length;
  if (!n) return view;
  S.now = view[n - 1].i;
  if (S.paused || n < 2 || head >= S.now) return view;
  const a = view[n - 2], b = view[n - 1], p = Math.max(0, Math.min(1, (head - a.i) / (b.i - a.i)));
  S.now = a.i + p * (b.i - a.i);
  const tip = { ...b, i: S.now };
  for (const name of ["y", "s", "z", "u", "truth", "cursor", "k"]) if (b[name]) tip[name] = mean(a[name], b[name], p);
  if (b.decoders) tip.decoders = Object.fromEntries(Object.entries(b.decoders).map(([name, v]) => [name, mean(a.decoders && a.decoders[name], v, p)]));
  view[n - 1] = tip;
  return view;
}

function forget() {
  S.bins = []; at = new Map(); early = new Map();
  S.truth = false; S.inputs = 0; S.others = []; pace = []; head = -1;
  hooks.forgotten();
}

function noted(one) {
  if (one.truth) S.truth = true;
  if (one.u) S.inputs = one.u.length;
  if (one.decoders) { const names = Object.keys(one.decoders); if (names.join("\n") !== S.others.join("\n")) S.others = names; }
}

function bin(one) {
  one.r = Float32Array.from(one.r, (v) => (v === null ? 0 : v));
  const known = at.get(one.i);
  if (known) { Object.assign(known, one); return; }
  if (early.has(one.i)) { Object.assign(one, early.get(one.i)); early.delete(one.i); }
  S.bins.push(one); at.set(one.i, one); noted(one);
  const most = Math.min(MOST, MOST_S / width(), Math.max(1000, MOST_NUMBERS / (one.r.length + 20)));
  if (S.bins.length > most * 1.1) S.bins.splice(0, S.bins.length - Math.floor(most)).forEach((b) => at.delete(b.i));
}

function more(i, values) { // of a bin, whose answer may not have come yet
  if (i < 0) return;
  const known = at.get(i);
  if (known) { Object.assign(known, values); noted(values); } else early.set(i, Object.assign(early.get(i) || {}, values));
  if (early.size > EARLY) early.delete(early.keys().next().value);
}

function take(entry) {
  if (entry.b) bin(entry.b);
  else if (entry.d) {
    const d = entry.d;
    more(d.i, { c: d.c ? Uint8Array.from(d.c, (v) => Math.min(v, 255)) : null, x: d.x });
    if (d.u) more(d.ui, { u: d.u });
  } else if (entry.t) {
    const { bin: i, ...values } = entry.t;
    more(i, values);
  } else if (entry.e) hooks.event(entry.e);
}

export function hear(piece, now) {
  const log = piece.log || [];
  if (piece.state) hooks.told(piece.state);
  for (const one of piece.alarms || []) if (one.n > alarmed) { alarmed = one.n; hooks.alarm(one); }
  if (piece.fresh) forget();
  log.forEach(take);
  if (S.bins.length && log.some((one) => one.b)) arrived(log.length, now);
  touch();
}

export function connect(given) {
  hooks = given || hooks;
  if (source) source.close();
  forget();
  source = new EventSource(address("stream", { session: S.session }));
  source.onmessage = (event) => hear(JSON.parse(event.data), performance.now());
  source.onerror = () => { say(el("service"), "connection lost, trying again"); el("service").className = "gone"; };
}

export function disconnect() { // a page that nobody sees costs nothing; the server keeps the last minutes
  if (source) source.close();
  source = null;
}

// R2 of a decoder on the bins whose truth is known, the mean of the channels that move.
export function r2(view, values) {
  const pairs = view.map((b) => [b.truth, values(b)]).filter(([t, v]) => t && v && v.every((x) => x !== null) && t.every((x) => x !== null));
  if (pairs.length < 10) return null;
  let sum = 0, channels = 0;
  for (let d = 0; d < pairs[0][0].length; d++) {
    const middle = pairs.reduce((s, [t]) => s + t[d], 0) / pairs.length;
    let left = 0, all = 0;
    for (const [t, v] of pairs) { left += (t[d] - v[d]) ** 2; all += (t[d] - middle) ** 2; }
    if (all > 0) { sum += 1 - left / all; channels += 1; }
  }
  return channels ? sum / channels : null;
}

// Widths are read when they change and not while drawing, which would make the browser lay out the page anew.
const rooms = new Map();
const resized = new ResizeObserver((entries) => {
  for (const one of entries) rooms.set(one.target, one.contentRect.width);
  touch();
});
export function room(node) {
  if (!rooms.has(node)) { rooms.set(node, node.clientWidth); resized.observe(node); }
  return rooms.get(node);
}

export function context(id, height) {
  const canvas = el(id), ratio = devicePixelRatio || 1;
  const tall = height || Number(canvas.dataset.h || (canvas.dataset.h = canvas.getAttribute("height")));
  const h = Math.round(tall * ratio), w = Math.round(room(canvas) * ratio);
  const c = canvas.getContext("2d");
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w; canvas.height = h; canvas.style.height = tall + "px";
    c.font = 11 * ratio + "px system-ui";
  }
  c.clearRect(0, 0, w, h);
  return [c, w, h, ratio];
}
