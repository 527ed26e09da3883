// What has come of one session, and the stream it comes by.
export const Z90 = 1.6448536269514722, RADIUS90 = 2.145966026289347;
export const OURS = "iLQR-VAE";
export const TONES = ["#2f7fe6", "#e0832a", "#2fa36b", "#9a6be0"];
export const STATUS = { ok: "#2fa36b", degraded: "#e0832a", late: "#dd4b4b", missing: "#8b929c", extrapolated: "#9a6be0" };
const OTHERS = ["#9a6be0", "#e0832a", "#2fa36b", "#c2497f"];
const MOST = 6000, EARLY = 2000;

export const el = (id) => document.getElementById(id);
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const S = { state: null, session: "", bins: [], paused: false, frozen: [], dirty: true, frames: 0 };
export const info = () => S.state && S.state.sessions.find((s) => s.session === S.session);
export const width = () => (S.state && S.state.bin_width) || 0.05;

const token = new URLSearchParams(location.search).get("token");
export function address(path, more) {
  const query = new URLSearchParams(more || {});
  if (token) query.set("token", token);
  return path + (query.size ? "?" + query : "");
}

let source = null, at = new Map(), early = new Map(), hooks = {}, alarmed = 0;

export function rivals() {
  for (let k = S.bins.length - 1; k >= Math.max(0, S.bins.length - 50); k--) if (S.bins[k].decoders) return Object.keys(S.bins[k].decoders);
  return [];
}
export const tone = (name, names) => (name === OURS ? TONES[0] : OTHERS[names.indexOf(name) % OTHERS.length]);

export function shown() {
  const all = S.paused ? S.frozen : S.bins;
  const count = Math.round(Number(el("span").value) / width());
  const most = Math.max(0, (all.length - count) * width());
  const back = el("back");
  back.max = most.toFixed(1);
  const end = all.length - Math.round(Math.min(Number(back.value), most) / width());
  return all.slice(Math.max(0, end - count), end);
}

function forget() {
  S.bins = []; at = new Map(); early = new Map();
}

function bin(one) {
  one.r = Float32Array.from(one.r, (v) => (v === null ? 0 : v));
  const known = at.get(one.i);
  if (known) { Object.assign(known, one); return; }
  if (early.has(one.i)) { Object.assign(one, early.get(one.i)); early.delete(one.i); }
  S.bins.push(one); at.set(one.i, one);
  if (S.bins.length > MOST * 1.1) S.bins.splice(0, S.bins.length - MOST).forEach((b) => at.delete(b.i));
}

function more(i, values) { // of a bin, whose answer may not have come yet
  if (i < 0) return;
  const known = at.get(i);
  if (known) Object.assign(known, values);
  else early.set(i, Object.assign(early.get(i) || {}, values));
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
  } else if (entry.e) {
    hooks.alarm({ kind: "event", at: entry.e.at, what: entry.e.name + (entry.e.said ? ": " + entry.e.said : ""), session: "" });
  }
}

export function connect(given) {
  hooks = given || hooks;
  if (source) source.close();
  forget();
  source = new EventSource(address("stream", { session: S.session }));
  source.onmessage = (event) => {
    const piece = JSON.parse(event.data);
    if (piece.state) hooks.told(piece.state);
    for (const one of piece.alarms || []) if (one.n > alarmed) { alarmed = one.n; hooks.alarm(one); }
    if (piece.fresh) forget();
    (piece.log || []).forEach(take);
    S.dirty = true;
  };
  source.onerror = () => { el("service").textContent = "connection lost, trying again"; el("service").className = "gone"; };
}

// R2 of a decoder on the bins whose truth is known, the mean of the channels that move.
export function r2(view, values) {
  const pairs = view.map((b) => [b.truth, values(b)]).filter(([t, v]) => t && v && v.every((x) => x !== null));
  if (pairs.length < 10) return null;
  let sum = 0, channels = 0;
  for (let d = 0; d < pairs[0][0].length; d++) {
    const mean = pairs.reduce((s, [t]) => s + t[d], 0) / pairs.length;
    let left = 0, all = 0;
    for (const [t, v] of pairs) { left += (t[d] - v[d]) ** 2; all += (t[d] - mean) ** 2; }
    if (all > 0) { sum += 1 - left / all; channels += 1; }
  }
  return channels ? sum / channels : null;
}

export function context(id) {
  const canvas = el(id), ratio = devicePixelRatio || 1;
  const h = Math.round(Number(canvas.dataset.h || (canvas.dataset.h = canvas.getAttribute("height"))) * ratio);
  const w = Math.round(canvas.clientWidth * ratio);
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  canvas.style.height = h / ratio + "px";
  const c = canvas.getContext("2d");
  c.clearRect(0, 0, w, h);
  c.font = 11 * ratio + "px system-ui";
  return [c, w, h, ratio];
}
