"use strict";
// Reads values out of the curves, enlarges them and exchanges their axes. The page is whole without it.
(() => {
  const W = 320, H = 190, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 34, LARGEST = 1e300;
  const tools = document.getElementById("tools"), NS = "http://www.w3.org/2000/svg";
  const view = { scale: "drawn", from: -Infinity, to: Infinity };

  const make = (tag, attributes, text) => {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const count = (n) => n.toLocaleString("en-US", { maximumFractionDigits: 3 }).replace("-", "−");
  const told = (v) => (Number.isNaN(v) ? "not a number" : Math.abs(v) === Infinity ? (v > 0 ? "∞" : "−∞")
    : Math.abs(v) >= 1e5 ? v.toExponential(2) : String(Number(v.toPrecision(4)))).replace("-", "−");

  function read(figure) {
    const svg = figure.querySelector("svg.curve");
    const lines = [...svg.querySelectorAll("path[data-s]")].map((path) => {
      let at = 0;
      const steps = path.dataset.s.split(" ").flatMap((word) => {
        const [difference, times] = word.split("*").map(Number);
        return Array.from({ length: times || 1 }, () => (at += difference));
      });
      const values = path.dataset.v.split(" ").map((v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : Number(v)));
      return { css: path.getAttribute("class"), side: path.dataset.side, steps, values };
    });
    const named = lines.filter((line) => line.side && line.css !== "trend");
    const all = [...new Set(named.flatMap((line) => line.steps))].sort((a, b) => a - b);
    const marks = [...svg.querySelectorAll("[data-low], [data-high], .null")].map((mark) => ({
      css: mark.getAttribute("class"), tag: mark.tagName, low: mark.dataset.low, high: mark.dataset.high, v: mark.dataset.v,
    }));
    const drawn = svg.getAttribute("aria-label").includes("logarithmic axis");
    const axis = svg.querySelector(".axis").textContent, first = Number(svg.dataset.first), last = Number(svg.dataset.last);
    const out = document.createElement("output");
    figure.append(out);
    return { svg, lines, named, all, marks, drawn, axis, first, last, out, original: svg.innerHTML, at: -1, drag: null };
  }

  const nice = (rough) => {
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map((m) => m * power).find((x) => x >= rough * (1 - 1e-9));
  };
  const ticks = (low, high, step) =>
    Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1) },
      (_, k) => Number(((Math.ceil(low / step - 1e-9) + k) * step).toPrecision(12)));

  // The part of a line from one step to another, with the points where it crosses them.
  function cut({ steps, values }, from, to) {
    const kept = [];
    steps.forEach((step, k) => {
      for (const edge of [from, to]) {
        if (k && steps[k - 1] < edge && edge < step)
          kept.push([edge, values[k - 1] + ((values[k] - values[k - 1]) * (edge - steps[k - 1])) / (step - steps[k - 1])]);
      }
      if (from <= step && step <= to) kept.push([step, values[k]]);
    });
    return kept;
  }

  function draw(f) {
    const from = Math.max(view.from, f.first), to = Math.min(view.to, f.last);
    f.from = from; f.to = to;
    f.x = (step) => LEFT + ((W - LEFT - RIGHT) * (step - from)) / Math.max(to - from, 1e-9);
    f.svg.innerHTML = f.original;
    f.at = -1;
    f.out.textContent = "";
    if (view.scale === "drawn" && from === f.first && to === f.last) return;
    const parts = f.lines.map((line) => ({ ...line, points: from < to ? cut(line, from, to) : [] }));
    const seen = parts.filter((p) => p.side).flatMap((p) => p.points.map(([, v]) => v)).filter((v) => Math.abs(v) < LARGEST);
    const positive = seen.filter((v) => v > 0);
    const log = (view.scale === "log" || (view.scale === "drawn" && f.drawn)) && positive.length > 0;
    const values = log ? positive : seen;
    let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (values.length === 0) [low, high] = [0, 1];
    const turn = log ? Math.log10 : (v) => v;
    const pad = 0.05 * (turn(high) - turn(low)) || 0.5 * Math.abs(turn(high)) || 0.5;
    const bottom = turn(low) - pad, top = turn(high) + pad, room = H - TOP - BOTTOM;
    const y = (v) => (log && v <= 0 ? H - BOTTOM : Math.min(Math.max(TOP + (room * (top - turn(v))) / (top - bottom), TOP), H - BOTTOM));
    const fits = (v) => (!log || v > 0) && Math.abs(v) < LARGEST;
    const marks = log ? ticks(bottom, top, Math.max(1, Math.round((top - bottom) / 4))).map((k) => 10 ** k) : ticks(bottom, top, nice((top - bottom) / 4));
    const logged = log && marks.length < 2 ? ticks(10 ** bottom, 10 ** top, nice((10 ** top - 10 ** bottom) / 4)).filter((v) => v > 0) : marks;
    const across = { x1: LEFT, x2: W - RIGHT };
    const drawn = [];
    for (const mark of f.marks) {
      if (mark.tag === "rect") {
        const above = mark.high === undefined ? TOP : y(Number(mark.high)), below = mark.low === undefined ? H - BOTTOM : y(Number(mark.low));
        drawn.push(make("rect", { class: mark.css, x: LEFT, width: W - LEFT - RIGHT, y: above, height: Math.max(below - above, 0) }));
      }
    }
    const grid = make("g", { class: "grid" });
    for (const t of logged) {
      grid.append(make("line", { ...across, y1: y(t), y2: y(t) }));
      grid.append(make("text", { x: LEFT - 5, y: y(t) + 3.5, "text-anchor": "end" }, told(t)));
    }
    for (const t of ticks(from, to, Math.max(nice((to - from || 1) / 3), 1)))
      grid.append(make("text", { x: f.x(t), y: H - BOTTOM + 14, "text-anchor": f.x(t) > W - RIGHT - 20 ? "end" : "middle" }, count(t)));
    drawn.push(grid, make("text", { class: "axis", x: (W + LEFT) / 2, y: H - 4, "text-anchor": "middle" }, f.axis));
    for (const mark of f.marks) {
      const v = Number(mark.v);
      if (mark.tag === "line" && fits(v) && turn(v) >= bottom && turn(v) <= top)
        drawn.push(make("line", { ...across, class: mark.css, y1: y(v), y2: y(v) }));
    }
    for (const line of parts) {
      let path = "", down = false;
      for (const [step, v] of line.points) {
        if (fits(v)) path += `${down ? "L" : "M"}${f.x(step).toFixed(1)} ${y(v).toFixed(1)}`;
        down = fits(v);
      }
      drawn.push(make("path", { class: line.css, d: path }));
    }
    f.svg.replaceChildren(...drawn);
  }

  // Shows what every line is at one of its steps, or the nearest one before.
  function point(f, index) {
    const reach = f.all.map((step, k) => [step, k]).filter(([step]) => f.from <= step && step <= f.to);
    if (!reach.length) return;
    f.at = Math.min(Math.max(index, reach[0][1]), reach[reach.length - 1][1]);
    const step = f.all[f.at];
    const words = f.named.flatMap((line) => {
      const k = line.steps.findLastIndex((s) => s <= step);
      return k < 0 ? [] : [`${line.side} ${told(line.values[k])}${line.steps[k] === step ? "" : ` (at ${count(line.steps[k])})`}`];
    });
    const none = f.marks.find((mark) => mark.tag === "line");
    if (none) words.push(`null ${told(Number(none.v))}`);
    f.svg.querySelector(".cursor")?.remove();
    f.svg.append(make("line", { class: "cursor", x1: f.x(step), x2: f.x(step), y1: TOP, y2: H - BOTTOM }));
    f.out.textContent = `${f.axis} ${count(step)}: ${words.join(", ")}`;
    f.svg.setAttribute("aria-valuenow", step);
    f.svg.setAttribute("aria-valuetext", f.out.textContent);
  }

  function nearest(f, step) {
    let best = 0;
    f.all.forEach((s, k) => { if (Math.abs(s - step) < Math.abs(f.all[best] - step)) best = k; });
    return best;
  }
  const stepAt = (f, event) => {
    const box = f.svg.getBoundingClientRect(), x = ((event.clientX - box.left) * W) / box.width;
    return f.from + (Math.min(Math.max((x - LEFT) / (W - LEFT - RIGHT), 0), 1)) * (f.to - f.from);
  };

  function show(from, to) {
    view.from = from; view.to = to;
    const whole = from === -Infinity && to === Infinity;
    tools.querySelector("[name=from]").value = from === -Infinity ? "" : Math.round(from);
    tools.querySelector("[name=to]").value = to === Infinity ? "" : Math.round(to);
    tools.querySelector("button").disabled = whole;
    figures.forEach(draw);
  }

  function listen(f) {
    const svg = f.svg;
    for (const [name, value] of Object.entries({
      role: "slider", tabindex: 0, "aria-valuemin": f.first, "aria-valuemax": f.last, "aria-valuenow": f.last, "aria-valuetext": "not read yet",
    })) svg.setAttribute(name, value);
    svg.addEventListener("pointermove", (event) => {
      point(f, nearest(f, stepAt(f, event)));
      if (f.drag === null) return;
      const [a, b] = [f.x(f.drag), f.x(stepAt(f, event))].sort((p, q) => p - q);
      svg.querySelector(".chosen")?.remove();
      svg.append(make("rect", { class: "chosen", x: a, width: b - a, y: TOP, height: H - TOP - BOTTOM }));
    });
    svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      f.drag = stepAt(f, event);
      svg.setPointerCapture(event.pointerId);
      point(f, nearest(f, f.drag));
    });
    svg.addEventListener("pointerup", (event) => {
      const [a, b] = [f.drag ?? 0, stepAt(f, event)].sort((p, q) => p - q), dragged = f.drag !== null && f.x(b) - f.x(a) > 8;
      f.drag = null;
      svg.querySelector(".chosen")?.remove();
      if (dragged) show(a, b);
    });
    svg.addEventListener("pointercancel", () => { f.drag = null; svg.querySelector(".chosen")?.remove(); });
    svg.addEventListener("dblclick", () => show(-Infinity, Infinity));
    svg.addEventListener("keydown", (event) => {
      const last = f.all.length - 1, at = f.at < 0 ? last : f.at;
      const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
      if (event.key === "Escape") show(-Infinity, Infinity);
      else if (to === undefined) return;
      else point(f, to);
      event.preventDefault();
    });
  }

  const figures = [...document.querySelectorAll("figure.plot")].filter((figure) => figure.querySelector("path[data-s]")).map(read);
  figures.forEach((f) => { draw(f); listen(f); });
  if (!tools || !figures.length) return;
  tools.hidden = false;
  tools.addEventListener("change", (event) => {
    if (event.target.name === "scale") { view.scale = event.target.value; figures.forEach(draw); return; }
    const chosen = (name, otherwise) => { const v = tools.querySelector(`[name=${name}]`).value; return v === "" ? otherwise : Number(v); };
    const from = chosen("from", -Infinity), to = chosen("to", Infinity);
    if (from < to) show(from, to);
  });
  tools.querySelector("button").addEventListener("click", () => show(-Infinity, Infinity));
})();
