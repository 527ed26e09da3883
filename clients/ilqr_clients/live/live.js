// The page: what is drawn when, and its tools.
import * as charts from "./charts.js";
import { S, connect, css, el, info, rivals, shown, width } from "./core.js";
import * as planes from "./planes.js";
import * as units from "./units.js";
import * as whatif from "./whatif.js";

const number = charts.number;
window.live = { bins: () => S.bins.length, newest: () => S.bins[S.bins.length - 1], frames: () => S.frames, state: () => S, turned: planes.turned };

function alarm(one) {
  const item = document.createElement("li"), time = document.createElement("time");
  item.className = one.kind;
  time.textContent = new Date(1e3 * one.at).toLocaleTimeString();
  item.append(time, (one.session ? one.session + ": " : "") + one.what);
  el("alarms").prepend(item);
  while (el("alarms").children.length > 200) el("alarms").lastChild.remove();
}

function told(now) {
  S.state = now;
  const place = el("service");
  place.className = now.reachable ? "" : "gone";
  place.textContent = now.reachable ? now.endpoint + " · " + now.device : now.endpoint + ": no answer, trying again";
  const names = now.sessions.map((s) => s.session), picker = el("session");
  const kept = names.includes(S.session) || !names.length ? S.session : names[names.length - 1];
  if ([...picker.options].map((o) => o.value).join("\n") !== names.join("\n")) picker.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.length) picker.value = kept;
  el("empty").hidden = !!names.length || S.bins.length > 0;
  if (kept !== S.session) { S.session = kept; connect(); }
  models(now.models || []);
  whatif.told();
  S.dirty = true;
}

function models(list) {
  el("models").replaceChildren(...list.map((m) => {
    const row = document.createElement("tr");
    for (const text of [m.slot, m.model, m.role, m.bits === null ? "–" : number(m.bits)]) { const cell = document.createElement("td"); cell.textContent = text; row.append(cell); }
    return row;
  }));
}

function tiles(view, scores) {
  const last = view[view.length - 1], now = info(), deadline = now ? now.deadline_ms : null;
  const spikes = view.reduce((s, b) => s + b.spikes, 0), bits = view.reduce((s, b) => s + (b.bits || 0), 0);
  const totals = view.map((b) => b.total).sort((a, b) => a - b), p99 = totals[Math.min(totals.length - 1, Math.floor(0.99 * totals.length))];
  const tile = (name, value, note) => { el(name).textContent = value; el(name).nextElementSibling.textContent = note || ""; };
  tile("t-r2", scores[0][1] === null ? "–" : scores[0][1].toFixed(2), scores[0][1] === null ? "no truth is known" : "over the last minute");
  tile("t-latency", number(last.total) + " ms", "p99 " + number(p99) + " of " + (deadline === null ? "–" : number(deadline)) + " ms");
  tile("t-bits", spikes ? (bits / spikes).toFixed(3) : "–", "0 is as good as mean rates");
  tile("t-drift", drift === null ? "–" : drift.toFixed(2), "bits lost in 5 s against its best");
  const values = S.state.names.slice(0, 4).map((name, d) => name + " " + number(last.y[d]) + " ± " + number(last.s[d]) + " " + (S.state.units[d] || ""));
  el("numbers").textContent = "bin " + last.i + "   " + values.join("   ") + "   " + last.status;
  el("counts").textContent = now ? Object.entries(now.statuses).map(([k, v]) => k + " " + v).join(" · ") : "";
}

// What a person follows by eye is drawn anew at every picture, the rest at every third: painting costs
// the page more than anything else. What was left out is drawn once nothing newer comes for a while.
const SELDOM = 3, QUIET_MS = 150;
let scored = 0, scores = [["", null]], drift = null, behind = false, drawn = 0;
function draw(now) {
  requestAnimationFrame(draw);
  if (!(S.dirty || (behind && now - drawn > QUIET_MS)) || !S.state || !S.state.names) return;
  drawn = now;
  const view = shown(), all = !S.dirty || S.paused || S.frames % SELDOM === 0;
  S.dirty = false; behind = !all;
  S.frames += 1;
  if (!view.length) return;
  el("empty").hidden = true;
  if (performance.now() - scored > 250) {
    scored = performance.now();
    const known = S.paused ? S.frozen : S.bins;
    scores = charts.scores(known.slice(-Math.round(60 / width())));
    whatif.scoreboard(scores);
    drift = charts.drift(known);
  }
  charts.build();
  charts.traces(view);
  if (S.state.names.length >= 2) { planes.decoded(view); planes.cursor(view); }
  tiles(view, scores);
  if (!all) return;
  charts.others(view);
  planes.latents(view);
  units.draw(view);
}

function pause(on) {
  S.paused = on; S.frozen = on ? S.bins.slice() : [];
  el("pause").textContent = on ? "go on, live" : "pause";
  el("pause").setAttribute("aria-pressed", String(on));
  if (!on) el("back").value = 0;
  S.dirty = true;
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob); link.download = (S.session || "live") + ending; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function csv() {
  const quote = (text) => '"' + String(text).replaceAll('"', '""') + '"', names = S.state.names, others = rivals(), truth = S.bins.some((b) => b.truth);
  const head = ["bin", "status", ...names.flatMap((n) => [quote(n), quote(n + " std")]), ...(truth ? names.map((n) => quote(n + " truth")) : []),
    ...others.flatMap((o) => names.map((n) => quote(n + " " + o))), "bits", "spikes", "total_ms", "solve_ms"];
  const cells = (values) => names.map((_, d) => (values && values[d] !== undefined && values[d] !== null ? values[d] : ""));
  const rows = shown().map((b) => [b.i, b.status, ...b.y.flatMap((v, d) => [v ?? "", b.s[d] ?? ""]), ...(truth ? cells(b.truth) : []),
    ...others.flatMap((o) => cells(b.decoders && b.decoders[o])), b.bits ?? "", b.spikes, b.total, b.ms.solve].join(","));
  return head.join(",") + "\n" + rows.join("\n") + "\n";
}
window.live.csv = csv;

function picture() {
  const cards = [...document.querySelectorAll("main section")].filter((s) => !s.hidden && s.querySelector("canvas")), gap = 16;
  const parts = cards.map((s) => [s.querySelector("h2").firstChild.textContent, [...s.querySelectorAll("canvas")].filter((x) => x.width && x.height)]);
  const sheet = document.createElement("canvas");
  sheet.width = Math.max(...parts.flatMap(([, c]) => c.map((x) => x.width))) + 2 * gap;
  sheet.height = parts.reduce((s, [, c]) => s + 28 + c.reduce((t, x) => t + x.height + gap, 0), gap);
  const c = sheet.getContext("2d");
  c.fillStyle = css("--card"); c.fillRect(0, 0, sheet.width, sheet.height);
  let y = gap;
  for (const [title, all] of parts) {
    c.fillStyle = css("--ink"); c.font = "600 15px system-ui"; c.fillText(title, gap, y + 14); y += 28;
    for (const one of all) { c.drawImage(one, gap, y); y += one.height + gap; }
  }
  sheet.toBlob((blob) => save(blob, ".png"));
}

el("session").addEventListener("change", (event) => { S.session = event.target.value; pause(false); connect(); });
el("span").addEventListener("change", () => (S.dirty = true));
el("back").addEventListener("input", () => { if (!S.paused && Number(el("back").value) > 0) pause(true); S.dirty = true; });
el("pause").addEventListener("click", () => pause(!S.paused));
el("csv").addEventListener("click", () => save(new Blob([csv()], { type: "text/csv" }), ".csv"));
el("png").addEventListener("click", picture);
addEventListener("resize", () => (S.dirty = true));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (S.dirty = true));
units.start(); planes.start(); whatif.start();
connect({ told, alarm });
requestAnimationFrame(draw);
