"use strict";
(function () {
  const Z90 = 1.6448536269514722, RADIUS90 = 2.145966026289347;
  const TONES = ["#2f7fe6", "#e0832a", "#2fa36b", "#9a6be0"];
  const STATUS = { ok: "#2fa36b", degraded: "#e0832a", late: "#dd4b4b", missing: "#8b929c", extrapolated: "#9a6be0" };
  const MOST = 6000;
  const el = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const token = new URLSearchParams(location.search).get("token");
  const address = (path, more) => {
    const query = new URLSearchParams(more || {});
    if (token) query.set("token", token);
    return path + (query.size ? "?" + query : "");
  };
  let state = null, session = "", bins = [], paused = false, frozen = [], source = null, drawn = 0, dirty = true;
  window.live = { bins: () => bins.length, newest: () => bins[bins.length - 1], frames: () => drawn };

  function connect() {
    if (source) source.close();
    bins = [];
    source = new EventSource(address("stream", { session }));
    source.onmessage = (event) => {
      const piece = JSON.parse(event.data);
      if (piece.state) told(piece.state);
      if (piece.alarms) piece.alarms.forEach(alarm);
      if (piece.fresh) bins = [];
      if (piece.bins) {
        for (const one of piece.bins) {
          if (one.revision && bins.length) {
            const at = bins.findLastIndex((b) => b.i === one.i);
            if (at >= 0) { bins[at] = one; continue; }
          }
          bins.push(one);
        }
        if (bins.length > MOST) bins.splice(0, bins.length - MOST);
      }
      dirty = true;
    };
    source.onerror = () => { el("service").textContent = "connection lost, trying again"; el("service").className = "gone"; };
  }

  let alarmed = 0;
  function alarm(one) {
    if (one.n <= alarmed) return;
    alarmed = one.n;
    const item = document.createElement("li");
    item.className = one.kind;
    item.textContent = new Date(1e3 * one.at).toLocaleTimeString() + "  " + (one.session ? one.session + ": " : "") + one.what;
    el("alarms").prepend(item);
    while (el("alarms").children.length > 200) el("alarms").lastChild.remove();
  }

  function told(now) {
    const before = state;
    state = now;
    const place = el("service");
    place.className = now.reachable ? "" : "gone";
    place.textContent = now.reachable
      ? now.endpoint + ", model " + now.models.filter((m) => m.role !== "before").map((m) => m.model + " (" + m.role + ")").join(", ") + ", " + now.device
      : now.endpoint + ": no answer, trying again";
    const names = now.sessions.map((s) => s.session);
    const picker = el("session");
    const kept = names.includes(session) || !names.length ? session : names[0];
    if ([...picker.options].map((o) => o.value).join("\n") !== names.join("\n")) {
      picker.replaceChildren(...names.map((name) => new Option(name, name)));
    }
    if (names.length) picker.value = kept;
    if (kept !== session) { session = kept; connect(); }
    const shape = (s) => s && s.names && JSON.stringify([s.names, s.units, s.bin_width]);
    if (now.names && shape(before) !== shape(now)) build();
    dirty = true;
  }

  const charts = {};
  function chart(place, title, lines, bands) {
    const axis = { stroke: () => css("--soft"), font: "11px system-ui", grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 } };
    const series = [{ label: "s" }].concat(lines.map((line) => ({
      label: line.name, stroke: line.tone, width: line.width === undefined ? 1.5 : line.width, points: { show: false },
      value: (_, v) => (v === null || v === undefined ? "–" : Number(v.toPrecision(3)).toString()),
    })));
    const u = new uPlot({ width: Math.max(200, place.clientWidth), height: 130, title: undefined, series, bands: bands || [],
      scales: { x: { time: false } }, legend: { show: lines.length > 1 },
      axes: [{ ...axis, size: 24 }, { ...axis, size: 50, space: 24, label: title, labelSize: 16, labelFont: "11px system-ui" }], cursor: { drag: { x: false, y: false } } },
      [[], ...lines.map(() => [])], place);
    return u;
  }
  function build() {
    for (const u of Object.values(charts).flat()) u.destroy();
    const quantity = (name, unit) => (unit ? name + " (" + unit + ")" : name);
    charts.traces = state.names.slice(0, 4).map((name, d) => chart(el("traces"), quantity(name, state.units[d]),
      [{ name: "from", tone: TONES[0] + "38", width: 0.5 }, { name: "to", tone: TONES[0] + "38", width: 0.5 }, { name, tone: TONES[0] }],
      [{ series: [2, 1], fill: TONES[0] + "38" }]));
    charts.latents = [chart(el("latents"), "a.u.", TONES.map((tone, k) => ({ name: "no. " + (k + 1), tone })))];
    charts.latency = [chart(el("latency"), "ms", [{ name: "total", tone: TONES[0] }, { name: "solve", tone: STATUS.ok }, { name: "deadline", tone: STATUS.late }])];
  }

  function shown() {
    const all = paused ? frozen : bins;
    const width = (state && state.bin_width) || 0.05;
    const count = Math.round(Number(el("span").value) / width);
    const most = Math.max(0, (all.length - count) * width);
    const back = el("back");
    back.max = most.toFixed(1);
    const end = all.length - Math.round(Math.min(Number(back.value), most) / width);
    return all.slice(Math.max(0, end - count), end);
  }

  function context(id) {
    const canvas = el(id), ratio = devicePixelRatio || 1;
    const w = Math.round(canvas.clientWidth * ratio), h = Math.round(Number(canvas.dataset.h || (canvas.dataset.h = canvas.getAttribute("height"))) * ratio);
    if (canvas.width !== w) canvas.width = w;
    if (canvas.height !== h) canvas.height = h;
    const c = canvas.getContext("2d");
    c.clearRect(0, 0, w, h);
    return [c, w, h, ratio];
  }

  function path2d(id, points, ellipse, labels) {
    const [c, w, h, ratio] = context(id);
    const known = points.filter((p) => p && p[0] !== null && p[1] !== null);
    const room = Math.min(w, h) / 2 - 14 * ratio;
    if (!known.length || room <= 0) return; // a canvas has next to no size while the page is laid out
    const xs = known.map((p) => p[0]), ys = known.map((p) => p[1]);
    const mid = (v) => (Math.min(...v) + Math.max(...v)) / 2;
    const reach = 1.2 * Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys), 1e-9) / 2 + (ellipse ? Math.max(ellipse[0], ellipse[1]) : 0);
    const scale = room / reach, cx = mid(xs), cy = mid(ys);
    const X = (x) => w / 2 + (x - cx) * scale, Y = (y) => h / 2 - (y - cy) * scale;
    c.strokeStyle = css("--grid"); c.lineWidth = ratio;
    c.beginPath(); c.moveTo(X(0), 0); c.lineTo(X(0), h); c.moveTo(0, Y(0)); c.lineTo(w, Y(0)); c.stroke();
    c.strokeStyle = TONES[0]; c.lineWidth = 1.6 * ratio;
    for (let k = 1; k < known.length; k++) {
      c.globalAlpha = 0.08 + 0.92 * (k / known.length) ** 2;
      c.beginPath(); c.moveTo(X(known[k - 1][0]), Y(known[k - 1][1])); c.lineTo(X(known[k][0]), Y(known[k][1])); c.stroke();
    }
    const last = known[known.length - 1];
    c.globalAlpha = 1;
    if (ellipse) {
      c.globalAlpha = 0.2; c.fillStyle = TONES[0];
      c.beginPath(); c.ellipse(X(last[0]), Y(last[1]), ellipse[0] * scale, ellipse[1] * scale, 0, 0, 7); c.fill();
      c.globalAlpha = 1;
    }
    c.fillStyle = TONES[0];
    c.beginPath(); c.arc(X(last[0]), Y(last[1]), 4 * ratio, 0, 7); c.fill();
    c.fillStyle = css("--soft"); c.font = 11 * ratio + "px system-ui";
    c.fillText(labels[1], X(0) + 4 * ratio, 12 * ratio);
    c.textAlign = "right"; c.fillText(labels[0], w - 4 * ratio, Y(0) - 4 * ratio); c.textAlign = "left";
  }

  // First two principal directions by power iteration on the covariance.
  function plane(rows) {
    const n = rows[0].length, mean = Array(n).fill(0);
    rows.forEach((r) => r.forEach((v, k) => (mean[k] += v / rows.length)));
    const centred = rows.map((r) => r.map((v, k) => v - mean[k]));
    const axes = [];
    for (let a = 0; a < Math.min(2, n); a++) {
      let v = Array.from({ length: n }, (_, k) => 1 / (1 + ((k + a) % n)));
      for (let turn = 0; turn < 12; turn++) {
        const next = Array(n).fill(0);
        for (const r of centred) { let s = 0; for (let k = 0; k < n; k++) s += r[k] * v[k]; for (let k = 0; k < n; k++) next[k] += s * r[k]; }
        for (const before of axes) { let s = 0; for (let k = 0; k < n; k++) s += next[k] * before[k]; for (let k = 0; k < n; k++) next[k] -= s * before[k]; }
        const size = Math.hypot(...next) || 1;
        v = next.map((x) => x / size);
      }
      axes.push(v);
    }
    return centred.map((r) => axes.map((v) => v.reduce((s, x, k) => s + x * r[k], 0)).concat(0).slice(0, 2));
  }

  function draw() {
    requestAnimationFrame(draw);
    if (!dirty || !state || !state.names || !charts.latency) return;
    dirty = false;
    const view = shown();
    drawn += 1;
    if (!view.length) return;
    const time = view.map((b) => b.i * state.bin_width);
    const put = (u, columns) => { u.setSize({ width: Math.max(200, u.root.parentNode.clientWidth), height: 130 }); u.setData([time, ...columns]); };
    charts.traces.forEach((u, d) => put(u, [-1, 1, 0].map((k) => view.map((b) => (b.y[d] === null || b.y[d] === undefined ? null : b.y[d] + k * Z90 * (b.s[d] || 0))))));
    const finite = view.filter((b) => b.z.every((v) => v !== null));
    if (finite.length > 2) {
      const n = finite[0].z.length;
      const spread = Array.from({ length: n }, (_, k) => { const m = finite.reduce((s, b) => s + b.z[k], 0) / finite.length; return [finite.reduce((s, b) => s + (b.z[k] - m) ** 2, 0), k]; });
      const order = spread.sort((a, b) => b[0] - a[0]).slice(0, 4).map((x) => x[1]);
      put(charts.latents[0], TONES.map((_, j) => view.map((b) => (order[j] === undefined ? null : b.z[order[j]]))));
      path2d("pca", plane(finite.slice(-600).map((b) => b.z)), null, ["PC 1 (a.u.)", "PC 2 (a.u.)"]);
    }
    const info = state.sessions.find((s) => s.session === session);
    const deadline = info ? info.deadline_ms : null;
    put(charts.latency[0], [view.map((b) => b.total), view.map((b) => b.ms.solve), view.map(() => deadline)]);
    if (state.names.length >= 2) {
      const last = view[view.length - 1];
      path2d("plane", view.slice(-400).map((b) => b.y), last.s[0] ? [RADIUS90 * last.s[0], RADIUS90 * last.s[1]] : null, state.names.slice(0, 2));
    }
    statuses(view); rates(view); spread(view, deadline);
    const spikes = view.reduce((s, b) => s + b.spikes, 0), bits = view.reduce((s, b) => s + (b.bits || 0), 0);
    const last = view[view.length - 1];
    const values = state.names.slice(0, 4).map((name, d) => name + " " + (last.y[d] === null ? "–" : last.y[d].toPrecision(3)) + " ± " + (last.s[d] === null ? "–" : last.s[d].toPrecision(2)) + " " + state.units[d]);
    el("numbers").textContent = "bin " + last.i + "   " + values.join("   ") + "   bits per spike " + (spikes ? (bits / spikes).toFixed(3) : "–") + "   latency " + last.total.toFixed(2) + " ms of " + (deadline === null ? "–" : deadline) + " ms";
    el("masked").textContent = info && info.flagged.length ? "masked: " + info.flagged.map((f) => f.replace(":", " (") + ")").join(", ") : "no unit is masked";
    el("counts").textContent = info ? Object.entries(info.statuses).map(([k, v]) => k + " " + v).join(", ") : "";
  }
  function statuses(view) {
    const [c, w, h] = context("statuses");
    view.forEach((b, k) => { c.fillStyle = STATUS[b.status] || "#000"; c.fillRect((k / view.length) * w, 0, Math.ceil(w / view.length), h); });
  }
  function rates(view) {
    const units = view[0].r.length;
    if (!units) return;
    const [c, w, h] = context("rates");
    const image = new ImageData(view.length, units);
    for (let n = 0; n < units; n++) {
      let top = 1e-9;
      for (const b of view) if (b.r[n] > top) top = b.r[n];
      view.forEach((b, k) => {
        const at = 4 * (n * view.length + k);
        image.data[at] = 47; image.data[at + 1] = 127; image.data[at + 2] = 230; image.data[at + 3] = 255 * Math.max(0, (b.r[n] || 0) / top);
      });
    }
    const small = rates.small || (rates.small = document.createElement("canvas"));
    small.width = view.length; small.height = units;
    small.getContext("2d").putImageData(image, 0, 0);
    c.imageSmoothingEnabled = false;
    c.drawImage(small, 0, 0, w, h);
  }
  function spread(view, deadline) {
    const [c, w, h, ratio] = context("spread");
    const values = view.map((b) => b.total).filter((v) => v > 0);
    if (!values.length) return;
    const low = Math.log10(Math.max(0.01, Math.min(...values) * 0.8)), high = Math.log10(Math.max(...values, deadline || 0) * 1.3), cells = 60;
    const counts = Array(cells).fill(0);
    values.forEach((v) => (counts[Math.min(cells - 1, Math.max(0, Math.floor(((Math.log10(v) - low) / (high - low)) * cells)))] += 1));
    const top = Math.max(...counts);
    c.fillStyle = TONES[0];
    counts.forEach((n, k) => c.fillRect((k / cells) * w, h - 14 * ratio - (n / top) * (h - 16 * ratio), w / cells - 1, (n / top) * (h - 16 * ratio)));
    c.font = 11 * ratio + "px system-ui"; c.fillStyle = css("--soft");
    c.fillText(10 ** low < 1 ? (10 ** low).toFixed(2) + " ms" : (10 ** low).toFixed(0) + " ms", 0, h - 2 * ratio);
    c.textAlign = "right"; c.fillText((10 ** high).toFixed(0) + " ms", w, h - 2 * ratio); c.textAlign = "left";
    if (deadline) { const x = ((Math.log10(deadline) - low) / (high - low)) * w; c.fillStyle = STATUS.late; c.fillRect(x, 0, 2 * ratio, h - 14 * ratio); }
  }

  el("session").addEventListener("change", (event) => { session = event.target.value; connect(); });
  el("span").addEventListener("change", () => (dirty = true));
  el("back").addEventListener("input", () => { if (!paused && Number(el("back").value) > 0) pause(true); dirty = true; });
  function pause(on) {
    paused = on; frozen = on ? bins.slice() : [];
    el("pause").textContent = on ? "go on, live" : "pause";
    el("pause").setAttribute("aria-pressed", String(on));
    if (!on) el("back").value = 0;
    dirty = true;
  }
  el("pause").addEventListener("click", () => pause(!paused));
  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob); link.download = name; link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  el("csv").addEventListener("click", () => {
    const quote = (text) => '"' + String(text).replaceAll('"', '""') + '"';
    const head = ["bin", "status", ...state.names.flatMap((n) => [quote(n), quote(n + " std")]), "bits", "spikes", "total_ms", "solve_ms"];
    const rows = shown().map((b) => [b.i, b.status, ...b.y.flatMap((v, d) => [v, b.s[d]]), b.bits, b.spikes, b.total, b.ms.solve].join(","));
    save(new Blob([head.join(",") + "\n" + rows.join("\n") + "\n"], { type: "text/csv" }), (session || "live") + ".csv");
  });
  el("png").addEventListener("click", () => {
    const all = [...document.querySelectorAll("main canvas")].filter((one) => one.width && one.height), w = Math.max(...all.map((c) => c.width));
    const sheet = document.createElement("canvas");
    sheet.width = w; sheet.height = all.reduce((s, c) => s + c.height + 12, 0);
    const c = sheet.getContext("2d");
    c.fillStyle = css("--card"); c.fillRect(0, 0, sheet.width, sheet.height);
    let y = 0;
    all.forEach((one) => { c.drawImage(one, 0, y); y += one.height + 12; });
    sheet.toBlob((blob) => save(blob, (session || "live") + ".png"));
  });
  addEventListener("resize", () => (dirty = true));
  connect();
  requestAnimationFrame(draw);
})();
