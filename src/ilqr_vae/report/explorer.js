"use strict";
(function () {
  const source = document.getElementById("run-data");
  const place = document.getElementById("explorer-charts");
  if (!source || !place) return;
  const run = JSON.parse(source.textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const numbers = (line) => {
    const raw = new DataView(bytes(line.b64).buffer);
    return Array.from({ length: run.bins }, (_, i) => {
      const q = raw.getInt16(2 * i, true);
      return q === -32768 ? null : line.low + (q + 32767) * line.step;
    });
  };
  const colour = (text) => {
    const name = /^var\((--\w+)\)$/.exec(text);
    return name ? getComputedStyle(document.documentElement).getPropertyValue(name[1]).trim() : text;
  };
  const time = Array.from({ length: run.bins }, (_, i) => run.start + i * run.step);
  const whole = [time[0], time[run.bins - 1]];
  const status = bytes(run.status);
  const charts = [];
  let range = whole.slice();

  function show(from, to) {
    const least = Math.min(4 * run.step, whole[1] - whole[0]);
    let width = Math.min(Math.max(to - from, least), whole[1] - whole[0]);
    let a = Math.min(Math.max((from + to - width) / 2, whole[0]), whole[1] - width);
    range = [a, a + width];
    charts.forEach((u) => u.setScale("x", { min: range[0], max: range[1] }));
    document.getElementById("explorer-range").textContent =
      range[0].toFixed(2) + " to " + range[1].toFixed(2) + " s";
  }
  function zoom(factor, at) {
    const centre = at === undefined ? (range[0] + range[1]) / 2 : at;
    show(centre - (centre - range[0]) * factor, centre + (range[1] - centre) * factor);
  }
  function move(share) {
    const width = range[1] - range[0];
    const a = Math.min(Math.max(range[0] + share * width, whole[0]), whole[1] - width);
    show(a, a + width);
  }

  // Bins that are not "ok" are shaded in the colour of their status.
  function shade(u) {
    const first = Math.max(0, Math.floor((u.scales.x.min - run.start) / run.step));
    const last = Math.min(run.bins - 1, Math.ceil((u.scales.x.max - run.start) / run.step));
    u.ctx.save();
    u.ctx.globalAlpha = 0.25;
    for (let i = first; i <= last; i++) {
      const [name, tone] = run.statuses[status[i]];
      if (name === "ok") continue;
      const x = u.valToPos(time[i], "x", true);
      const next = u.valToPos(time[i] + run.step, "x", true);
      u.ctx.fillStyle = colour(tone);
      u.ctx.fillRect(x, u.bbox.top, Math.max(1, next - x), u.bbox.height);
    }
    u.ctx.restore();
  }

  // Events are lines; the first chart names them where there is room.
  function mark(row) {
    return (u) => {
      const shown = run.events.filter(([t]) => t >= u.scales.x.min && t <= u.scales.x.max);
      u.ctx.save();
      u.ctx.strokeStyle = u.ctx.fillStyle = colour("var(--soft)");
      u.ctx.setLineDash([4, 4]);
      u.ctx.font = 10 * devicePixelRatio + "px system-ui, sans-serif";
      u.ctx.textAlign = "left";
      let free = -Infinity;
      shown.forEach(([t, name]) => {
        const x = Math.round(u.valToPos(t, "x", true));
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
        const end = x + 8 + u.ctx.measureText(name).width;
        if (row === 0 && x > free && end < u.bbox.left + u.bbox.width) {
          u.ctx.fillText(name, x + 3, u.bbox.top + 10 * devicePixelRatio);
          free = end;
        }
      });
      u.ctx.restore();
    };
  }

  function build() {
    const width = () => Math.max(220, place.clientWidth);
    const axis = { stroke: () => colour("var(--soft)"), grid: { stroke: () => colour("var(--grid)"), width: 1 },
                   ticks: { stroke: () => colour("var(--grid)"), width: 1 }, font: "12px system-ui, sans-serif" };
    run.charts.forEach((chart, row) => {
      const title = document.createElement("h3");
      title.textContent = chart.title + (chart.unit ? " (" + chart.unit + ")" : "");
      place.append(title);
      const bands = [];
      const series = [{ label: "time (s)", value: (_, v) => (v === null ? "–" : v.toFixed(2)) }];
      chart.lines.forEach((line, i) => {
        if (line.fills) bands.push({ series: [i + 1, i], fill: line.colour + "38" });
        series.push({
          label: line.name, show: !line.hidden, points: { show: false },
          stroke: () => (line.edge ? line.colour + "38" : colour(line.colour)),
          width: line.edge ? 0.5 : line.name === "iLQR-VAE" ? 1.8 : 1.2,
          value: (_, v) => (v === null || v === undefined ? "–" : Number(v.toPrecision(4)).toString()),
        });
      });
      const last = row === run.charts.length - 1;
      const u = new uPlot({
        width: width(), height: last ? 170 : 145, series, bands,
        scales: { x: { time: false, min: range[0], max: range[1] } },
        axes: [{ ...axis, label: last ? "time (s)" : undefined, labelSize: 18, size: 28 },
               { ...axis, size: 52, space: 24 }],
        cursor: { sync: { key: "run" }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
        hooks: {
          drawAxes: [shade, mark(row)],
          setSelect: [(u) => {
            if (u.select.width < 4) return;
            show(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          }],
        },
      }, [time, ...chart.lines.map((line) => (line.numbers ??= numbers(line)))], place);
      u.over.addEventListener("dblclick", () => show(...whole));
      u.over.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.shiftKey) return;
        event.preventDefault();
        if (event.shiftKey) return move(Math.sign(event.deltaY || event.deltaX) * 0.1);
        zoom(event.deltaY > 0 ? 1.25 : 0.8, u.posToVal(event.offsetX, "x"));
      }, { passive: false });
      charts.push(u);
    });
    new ResizeObserver(() => charts.forEach((u) => u.setSize({ width: width(), height: u.height })))
      .observe(place);
  }

  document.documentElement.classList.add("scripted");
  build();
  document.getElementById("explorer").addEventListener("click", (event) => {
    const act = event.target.dataset && event.target.dataset.act;
    ({ in: () => zoom(0.5), out: () => zoom(2), back: () => move(-0.5), on: () => move(0.5),
       all: () => show(...whole) }[act] || (() => {}))();
  });
  const length = Math.min(whole[1] - whole[0], Math.max(300 * run.step, 15));
  const middle = (whole[0] + whole[1]) / 2;
  show(middle - length / 2, middle + length / 2);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((u) => u.redraw()));
})();
