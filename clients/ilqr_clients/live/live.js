// The page: what is drawn when, and its tools.
import * as charts from "./charts.js";
import { S, advance, connect, css, disconnect, el, hear, info, repaint, rivals, say, shown, slice, touch, width } from "./core.js";
import * as planes from "./planes.js";
import * as units from "./units.js";
import * as whatif from "./whatif.js";

const number = charts.number;

function note(place, one) {
  const item = document.createElement("li"), time = document.createElement("time");
  item.className = one.kind || "";
  time.textContent = new Date(1e3 * one.at).toLocaleTimeString();
  item.append(time, (one.session ? one.session + ": " : "") + one.what);
  el(place).prepend(item);
  while (el(place).children.length > 200) el(place).lastChild.remove();
}
const alarm = (one) => note("alarms", one);
const event = (one) => note("events", { at: one.at, what: "bin " + one.i + "  " + one.name + (one.said ? ": " + one.said : "") });
const forgotten = () => el("events").replaceChildren(); // they come again with the bins

function told(now) {
  S.state = now;
  const place = el("service");
  place.className = now.reachable ? "" : "gone";
  say(place, now.reachable ? now.endpoint + " · " + now.device : now.endpoint + ": no answer, trying again");
  const names = now.sessions.map((s) => s.session), picker = el("session");
  const kept = names.includes(S.session) || !names.length ? S.session : names[names.length - 1];
  if ([...picker.options].map((o) => o.value).join("\n") !== names.join("\n")) picker.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.length) picker.value = kept;
  el("empty").hidden = !!names.length || S.bins.length > 0;
  if (kept !== S.session) { S.session = kept; connect(); }
  models(now.models || []);
  whatif.told();
}

let listed = "";
function models(list) {
  const key = JSON.stringify(list);
  if (key === listed) return;
  listed = key;
  el("models").replaceChildren(...list.map((m) => {
    const row = document.createElement("tr");
    for (const text of [m.slot, m.model, m.role, m.bits === null ? "–" : number(m.bits)]) { const cell = document.createElement("td"); cell.textContent = text; row.append(cell); }
    return row;
  }));
}

let scored = 0, scores = [["", null]], drift = null;
function tiles(view) {
  if (performance.now() - scored > 500) {
    scored = performance.now();
    const known = S.paused ? S.frozen : S.bins;
    scores = charts.scores(known.slice(-Math.round(60 / width())));
    whatif.scoreboard(scores);
    drift = charts.drift(known);
  }
  const last = view[view.length - 1], now = info(), deadline = now ? now.deadline_ms : null;
  const spikes = view.reduce((s, b) => s + b.spikes, 0), bits = view.reduce((s, b) => s + (b.bits || 0), 0);
  const totals = view.map((b) => b.total).sort((a, b) => a - b), p99 = totals[Math.min(totals.length - 1, Math.floor(0.99 * totals.length))];
  const tile = (name, value, text) => { say(el(name), value); say(el(name).nextElementSibling, text); };
  tile("t-r2", scores[0][1] === null ? "–" : scores[0][1].toFixed(2), scores[0][1] === null ? "no truth is known" : "over the last minute");
  tile("t-latency", number(last.total) + " ms", "p99 " + number(p99) + " of " + (deadline === null ? "–" : number(deadline)) + " ms");
  tile("t-bits", spikes ? (bits / spikes).toFixed(3) : "–", "0 is as good as mean rates");
  tile("t-drift", drift === null ? "–" : drift.toFixed(2), "bits lost in 5 s against its best");
  const values = S.state.names.slice(0, 4).map((name, d) => name + " " + number(last.y[d]) + " ± " + number(last.s[d]) + " " + (S.state.units[d] || ""));
  say(el("numbers"), "bin " + Math.floor(last.i) + "   " + values.join("   ") + "   " + last.status);
  say(el("counts"), now ? Object.entries(now.statuses).map(([k, v]) => k + " " + v).join(" · ") : "");
}

// What a person follows by eye is drawn anew in each picture, the rest in turns: painting costs the page
// more than anything else. What is not in the window is drawn once a second, and where nothing moves, nothing is.
const EACH = [["traces", charts.traces], ["plane", planes.decoded], ["cursor", planes.cursor], ["pca", planes.latents]];
const IN_TURNS = [
  ["numbers", tiles], ["raster", units.raster], ["latents", charts.latents], ["rates", units.rates], ["latency", charts.latency], ["statuses", charts.score], ["classes", charts.classes],
];
const STEP_MS = 1e3 / 32, SELDOM_MS = 1e3;
const seen = new Set(), watch = new IntersectionObserver((entries) => {
  for (const one of entries) if (one.isIntersecting) seen.add(one.target); else seen.delete(one.target);
  touch();
}, { rootMargin: "80px" });
const cards = new Map([...EACH, ...IN_TURNS].map(([id]) => [id, el(id).closest("section, .tiles")])), card = (id) => cards.get(id);

let due = 0, awake = false, left = 0, turn = 0;
function wake() {
  if (!awake) { awake = true; requestAnimationFrame(frame); }
}

const last = new Map(); // when each was drawn
function draw(parts, view, whole, now) {
  for (const [id, one] of parts) {
    if (!whole && !seen.has(card(id)) && now - (last.get(id) ?? -SELDOM_MS) < SELDOM_MS) continue;
    last.set(id, now);
    one(view);
  }
}

function frame(now, whole) {
  awake = false;
  if (due > now + STEP_MS) due = now;
  if (now < due) return wake();
  due = Math.max(due + STEP_MS, now);
  if (!S.state || !S.state.names) return;
  const moved = !S.paused && advance(now), all = whole || (S.dirty && S.paused);
  if (S.dirty || moved) left = IN_TURNS.length;
  if (!left) return; // nothing moves: until something comes
  wake();
  S.dirty = false;
  S.frames += 1;
  const view = shown();
  if (!view.length) { left = 0; return; }
  for (const [id, there] of [["empty", false], ["cursor-card", planes.hasCursor(view)], ["plane-card", S.state.names.length > 1], ["traces-card", S.state.names.length > 0], ["classes-card", (S.state.classes || []).length > 0]])
    if (el(id).hidden === there) el(id).hidden = !there;
  charts.build();
  draw(EACH.filter(([id]) => !card(id).hidden), view, whole, now);
  const turns = IN_TURNS.filter(([id]) => !card(id).hidden);
  turn = (turn + 1) % turns.length;
  draw(all ? turns : [turns[turn]], view, whole, now);
  left = all ? 0 : left - 1;
}

function pause(on) {
  S.paused = on; S.frozen = on ? S.bins.slice() : [];
  say(el("pause"), on ? "go on, live" : "pause");
  el("pause").setAttribute("aria-pressed", String(on));
  if (!on) el("back").value = 0;
  touch();
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob); link.download = (S.session || "live") + ending; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csv() {
  const quote = (text) => '"' + String(text).replaceAll('"', '""') + '"', names = S.state.names, others = rivals(), truth = S.truth;
  const head = ["bin", "status", ...names.flatMap((n) => [quote(n), quote(n + " std")]), ...(truth ? names.map((n) => quote(n + " truth")) : []),
    ...others.flatMap((o) => names.map((n) => quote(n + " " + o))), "bits", "spikes", "total_ms", "solve_ms"];
  const cells = (values) => names.map((_, d) => (values && values[d] !== undefined && values[d] !== null ? values[d] : ""));
  const rows = slice().map((b) => [b.i, b.status, ...b.y.flatMap((v, d) => [v ?? "", b.s[d] ?? ""]), ...(truth ? cells(b.truth) : []),
    ...others.flatMap((o) => cells(b.decoders && b.decoders[o])), b.bits ?? "", b.spikes, b.total, b.ms.solve].join(","));
  return head.join(",") + "\n" + rows.join("\n") + "\n";
}

// The cards as they lie on the page: their titles, what is written in them, and their figures.
function picture() {
  due = 0; S.dirty = true; frame(performance.now(), true);
  const ratio = devicePixelRatio || 1, main = document.querySelector("main").getBoundingClientRect(), sheet = document.createElement("canvas"), c = sheet.getContext("2d");
  const place = (node) => { const r = node.getBoundingClientRect(); return [r.x - main.x, r.y - main.y, r.width, r.height]; };
  sheet.width = Math.ceil(main.width * ratio); sheet.height = Math.ceil(main.height * ratio);
  c.scale(ratio, ratio);
  c.fillStyle = css("--page"); c.fillRect(0, 0, main.width, main.height);
  for (const one of document.querySelectorAll("main section, .tiles > div")) {
    if (one.hidden || !one.offsetParent) continue;
    c.fillStyle = css("--card"); c.strokeStyle = css("--grid"); c.beginPath(); c.roundRect(...place(one), 12); c.fill(); c.stroke();
  }
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let text = walk.nextNode(); text; text = walk.nextNode()) {
    const within = text.parentElement, style = getComputedStyle(within);
    if (!text.data.trim() || !within.offsetParent || within.closest("select, ol")) continue;
    range.selectNodeContents(text);
    const [x, y, w, h] = place(range), lines = Math.max(1, Math.round(h / (1.5 * parseFloat(style.fontSize))));
    c.fillStyle = style.color; c.font = style.fontWeight + " " + style.fontSize + " " + style.fontFamily; c.textBaseline = "middle";
    const words = text.data.trim().split(/\s+/), each = Math.ceil(words.length / lines);
    for (let k = 0; k < lines; k++) c.fillText(words.slice(k * each, (k + 1) * each).join(" "), x, y + ((k + 0.5) * h) / lines, w + 2);
  }
  for (const mark of document.querySelectorAll(".legend i, #score-rows b")) { // colours of lines, and bars
    if (!mark.offsetParent) continue;
    const [x, y, w, h] = place(mark), share = mark.style.getPropertyValue("--share");
    c.fillStyle = share === "" ? getComputedStyle(mark).borderTopColor : mark.style.getPropertyValue("--tone");
    c.fillRect(x, y, w * (share === "" ? 1 : Number(share)), h);
  }
  for (const canvas of document.querySelectorAll("main canvas")) if (canvas.width && canvas.height && canvas.offsetParent) c.drawImage(canvas, ...place(canvas));
  sheet.toBlob((blob) => save(blob, ".png"));
}

el("session").addEventListener("change", (event) => { S.session = event.target.value; pause(false); connect(); });
el("span").addEventListener("change", touch);
el("back").addEventListener("input", () => { if (!S.paused && Number(el("back").value) > 0) pause(true); touch(); });
el("pause").addEventListener("click", () => pause(!S.paused));
el("csv").addEventListener("click", () => save(new Blob([csv()], { type: "text/csv" }), ".csv"));
el("png").addEventListener("click", picture);
addEventListener("resize", touch);
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
window.live = { bins: () => S.bins.length, newest: () => S.bins[S.bins.length - 1], frames: () => S.frames, state: () => S, turned: planes.turned, csv, frame, hear };
document.querySelectorAll("main section, .tiles").forEach((one) => watch.observe(one));
units.start(); planes.start(); whatif.start();
connect({ told, alarm, event, forgotten, wake });
