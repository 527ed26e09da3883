// What if: steer a replay or a closed loop that allows it.
import { OURS, S, TONES, address, el, info, rivals, say, tone } from "./core.js";

const SLIDERS = [
  ["silent", "units silenced", 100, "%", 0, 80, 5],
  ["dropped", "bins dropped", 100, "%", 0, 80, 5],
  ["gain", "gain drift", 1, "σ", 0, 1.5, 0.05],
  ["noise", "noise", 1, "Hz", 0, 20, 1],
  ["latency", "latency", 1000, "ms", 0, 500, 25],
];
let touched = 0, waiting = null, pending = {};

async function send() {
  const change = pending;
  pending = {}; waiting = null;
  let said = "";
  try {
    const answer = await fetch(address("steer"), { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ session: S.session, change }) });
    if (!answer.ok) said = await answer.text();
  } catch { said = "the page's server does not answer"; }
  say(el("steer-said"), said);
}
function change(fields) {
  touched = performance.now();
  Object.assign(pending, fields);
  if (!waiting) waiting = setTimeout(send, 60);
}

const shown = (slider, value) => { slider.nextElementSibling.textContent = value + " " + slider.dataset.unit; };
export function start() {
  for (const [name, label, scale, unit, min, max, step] of SLIDERS) {
    const row = document.createElement("label"), text = document.createElement("span"), slider = document.createElement("input"), value = document.createElement("output");
    text.textContent = label;
    Object.assign(slider, { type: "range", id: "if-" + name, min, max, step, value: 0 });
    slider.dataset.unit = unit;
    slider.addEventListener("input", () => { shown(slider, slider.value); change({ [name]: Number(slider.value) / scale }); });
    row.append(text, slider, value);
    el("sliders").append(row);
    shown(slider, 0);
  }
  el("run-reset").addEventListener("click", () => {
    SLIDERS.forEach(([name]) => { const s = el("if-" + name); s.value = 0; shown(s, 0); });
    change(Object.fromEntries(SLIDERS.map(([name]) => [name, 0])));
  });
  el("run-pause").addEventListener("click", () => change({ paused: el("run-pause").getAttribute("aria-pressed") !== "true" }));
  el("run-loop").addEventListener("change", () => change({ loop: el("run-loop").checked }));
  el("run-seek").addEventListener("change", () => change({ seek: Number(el("run-seek").value) }));
  el("run-seek").addEventListener("input", () => (touched = performance.now()));
  el("run-decoder").addEventListener("change", () => change({ decoder: el("run-decoder").value }));
}

export function told() {
  const run = (info() || {}).run;
  el("whatif").hidden = !run;
  if (!run || performance.now() - touched < 1500) return;
  for (const [name, , scale] of SLIDERS) { const s = el("if-" + name); s.value = (run.disturbance[name] || 0) * scale; shown(s, Number(s.value)); }
  el("run-pause").setAttribute("aria-pressed", String(run.paused));
  say(el("run-pause"), run.paused ? "resume the run" : "pause the run");
  el("run-loop").checked = run.loop;
  el("replay-tools").hidden = run.kind !== "replay"; el("loop-tools").hidden = run.kind === "replay";
  Object.assign(el("run-seek"), { max: run.length, value: run.position });
  const picker = el("run-decoder");
  if (picker.options.length !== run.decoders.length) picker.replaceChildren(...run.decoders.map((name) => new Option(name, name)));
  picker.value = run.decoder;
}

export function scoreboard(scores) {
  const some = scores.some(([, v]) => v !== null), names = rivals();
  el("scores").hidden = !some;
  if (!some) return;
  const place = el("score-rows");
  if (place.children.length !== scores.length) place.replaceChildren(...scores.map(() => {
    const row = document.createElement("div");
    row.append(...["span", "b", "i"].map((kind) => document.createElement(kind)));
    return row;
  }));
  scores.forEach(([name, v], k) => {
    const [label, bar, value] = place.children[k].children;
    say(label, name); say(value, v === null ? "–" : v.toFixed(2));
    bar.style.setProperty("--share", Math.max(0, Math.min(1, v || 0)));
    bar.style.setProperty("--tone", name === OURS ? TONES[0] : tone(name, names));
  });
}
