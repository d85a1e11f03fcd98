"use strict";
const STEPS = 8, MOST_BITS = 8, $ = (root, name) => root.querySelector("." + name);

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

class Run {
  constructor(root, head, levels) {
    Object.assign(this, { root, head, levels, place: 0, target: -1, cursor: 0, found: [] });
    this.count = head.chars.length;
    this.units = head.widths.reduce((a, b) => a + b, 0);
    this.place = head.place;
    this.fill();
    this.drawText();
    this.listen();
    this.show(this.place);
    this.drawPatterns();
  }

  name(place) {
    let layer = 0;
    while (place >= this.head.widths[layer]) place -= this.head.widths[layer++];
    return `${layer + 1}:${place}`;
  }

  // The number of a unit's array, by default of the one that is shown, and its place; null where the page has none.
  parse(name) {
    const found = /^\s*(\d+)(?:\.(\w))?:(\d+)\s*$/.exec(name), { arrays, widths } = this.head;
    if (!found || !(+found[1] >= 1) || +found[1] > widths.length || +found[3] >= widths[found[1] - 1]) return null;
    const array = found[2] ? arrays.indexOf(found[2]) : $(this.root, "array").selectedIndex;
    return array < 0 ? null : [array, widths.slice(0, found[1] - 1).reduce((a, b) => a + b, 0) + +found[3]];
  }

  // The levels of a unit over the text: 0 to 254 for -1 to 1.
  of(place, array = $(this.root, "array").selectedIndex) {
    const start = (array * this.units + place) * this.count;
    return this.levels.subarray(start, start + this.count);
  }

  fill() {
    const head = this.head;
    for (const array of head.arrays)
      $(this.root, "array").append(make("option", { textContent: array === "c" ? "tanh(c)" : array, value: array }));
    $(this.root, "array").selectedIndex = head.array;
    for (const ranking of head.rankings)
      $(this.root, "sort").append(make("option", { value: "for " + ranking.name, textContent: "best for: " + ranking.name }));
    $(this.root, "about").textContent = head.about;
    if (!head.lookback) for (const o of $(this.root, "what").options) if (o.value === "influence") o.remove();
    if (!head.keeps) for (const o of $(this.root, "sort").options) if (o.value === "memory") o.remove();
  }

  drawText() {
    const text = $(this.root, "text"), head = this.head, lines = new Set(head.newlines), parts = document.createDocumentFragment();
    this.spans = head.chars.map((shown, i) => {
      const span = make("span", { className: "c", textContent: shown });
      span.place = i;
      if (head.signs.has(i)) span.firstChild.replaceWith(make("span", { className: "sign", textContent: shown }));
      parts.append(span);
      if (lines.has(i)) parts.append("\n");
      return span;
    });
    text.replaceChildren(parts);
  }

  // Five guesses for the character after each one are drawn when they are asked for first.
  drawRows(on) {
    const { head } = this, K = head.guesses;
    if (on && !this.hasRows)
      this.spans.forEach((span, i) => {
        for (let k = 0; k < K; k++) {
          const at = (i + 1) * K + k, p = i + 1 < this.count ? head.probability[at] / 1000 : 0;
          const small = make("small", { textContent: p ? head.words[head.guess[at]] : "" });
          small.className = p ? "s" + Math.round(p * STEPS) : "";
          span.append(small);
        }
      });
    this.hasRows ||= on;
    $(this.root, "text").classList.toggle("rows", on);
  }

  scale(levels) {
    if ($(this.root, "scale").value === "fixed") return 1;
    const counts = new Uint32Array(128);
    for (const level of levels) counts[Math.abs(level - 127)]++;
    let left = Math.floor(this.count / 100), size = 127;
    while (size > 1 && (left -= counts[size]) >= 0) size--;
    return size / 127;
  }

  show(place) {
    this.place = (place + this.units) % this.units;
    $(this.root, "unit").value = this.name(this.place);
    $(this.root, "unit").classList.remove("bad");
    this.color();
    this.drawUnit();
    for (const button of this.root.querySelectorAll("button[data-unit]")) {
      if (+button.dataset.unit === this.place) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  color() {
    const what = $(this.root, "what").value, { head, spans, count } = this;
    let least = -1, most = 1;
    if (what === "unit") {
      const levels = this.of(this.place), factor = STEPS / 127 / this.scale(levels);
      most = this.scale(levels);
      least = -most;
      for (let i = 0; i < count; i++) {
        const step = Math.max(-STEPS, Math.min(STEPS, Math.round((levels[i] - 127) * factor)));
        this.paint(i, "v" + (step + STEPS));
      }
    } else if (what === "bits") {
      [least, most] = [0, MOST_BITS];
      for (let i = 0; i < count; i++)
        this.paint(i, "s" + Math.min(STEPS, Math.round((head.bits[i] / MOST_BITS) * STEPS)));
    } else {
      const start = head.arrays.length * this.units * count, L = head.lookback;
      [least, most] = [0, this.target < 0 ? 0 : head.influence[this.target]];
      for (let i = 0; i < count; i++) {
        const back = this.target - i;
        const level = back >= 1 && back <= L ? this.levels[start + this.target * L + back - 1] : 0;
        this.paint(i, "s" + Math.round((level / 255) * STEPS));
      }
    }
    const kind = what === "unit" ? Array.from({ length: 2 * STEPS + 1 }, (_, k) => "v" + k) : Array.from({ length: STEPS + 1 }, (_, k) => "s" + k);
    const unit = { unit: "", bits: " bits", influence: " nats" }[what];
    $(this.root, "legend").replaceChildren(
      make("span", { className: "least", textContent: (+least.toPrecision(2)) + unit }),
      make("span", {}, ...kind.map((name) => make("span", { className: name }))),
      make("span", { className: "most", textContent: (+most.toPrecision(2)) + unit + (what === "bits" ? " or more" : "") }),
    );
  }

  paint(i, color) {
    const extra = (i === this.target ? " target" : "") + (i === this.cursor ? " cursor" : "") + (this.found.includes(i) ? " found" : "");
    const name = "c " + color + extra, span = this.spans[i];
    if (span.className !== name) span.className = name;
  }

  // What was expected at a character, and what is there.
  tell(i) {
    const { head } = this, K = head.guesses, mean = head.bits.slice(Math.max(0, i - 49), i + 1);
    const rows = Array.from({ length: K }, (_, k) =>
      make("tr", {}, make("td", { textContent: head.words[head.guess[i * K + k]] }), make("td", { textContent: (head.probability[i * K + k] / 10).toFixed(1) + " %" })));
    const value = (this.of(this.place)[i] - 127) / 127;
    $(this.root, "at").replaceChildren(
      make("b", { textContent: `${head.chars[i]} at ${i}` }),
      make("div", { className: "value", textContent: `${this.name(this.place)} ${value.toFixed(2)}` }),
      make("div", { className: "surprise", textContent: `${head.bits[i].toFixed(2)} bits, rank ${head.rank[i]}, ${head.entropy[i].toFixed(2)} bits expected; mean of the last ${mean.length}: ${(mean.reduce((a, b) => a + b, 0) / mean.length).toFixed(2)}` }),
      make("table", { className: "guesses" }, ...rows),
    );
  }

  click(i) {
    this.target = i;
    if (this.head.lookback) $(this.root, "what").value = "influence";
    this.color();
    this.tell(i);
    const L = this.head.lookback, start = this.head.arrays.length * this.units * this.count + i * L;
    if (L) $(this.root, "decay").replaceChildren(curve(this.levels.subarray(start, start + L), this.head.influence[i], `influence on this character, by distance 1 to ${L}`));
  }

  // Units that are on in all of a selected span and off just before it, and where else they are.
  select(first, last) {
    const least = +$(this.root, "threshold").value * 127 + 127, length = last - first + 1, chosen = [];
    for (let unit = 0; unit < this.units; unit++) {
      const levels = this.of(unit);
      if (first && levels[first - 1] > least) continue;
      let i = first;
      while (i <= last && levels[i] > least) i++;
      if (i > last) chosen.push(unit);
    }
    this.span = [first, last];
    const score = new Uint16Array(this.count);
    for (const unit of chosen) {
      const levels = this.of(unit);
      let run = 0;
      for (let i = this.count - 1; i >= 0; i--) {
        run = levels[i] > least ? run + 1 : 0;
        if (run >= length && (!i || levels[i - 1] <= least)) score[i]++;
      }
    }
    const places = [...score.keys()].filter((i) => score[i] && (i + length <= first || i > last));
    places.sort((a, b) => score[b] - score[a] || a - b);
    this.found = places.slice(0, 10);
    const words = (i) => this.head.chars.slice(Math.max(0, i - 10), i).join("") + "[" + this.head.chars.slice(i, i + length).join("") + "]";
    $(this.root, "span").replaceChildren(
      make("p", { className: "on", textContent: `${chosen.length} units on in the ${length} selected and off just before` }),
      make("div", { className: "units" }, ...chosen.slice(0, 200).map((unit) => this.button(unit))),
      ...this.found.map((i) => make("div", {}, make("button", { className: "match", textContent: `${score[i]} at ${i}: ${words(i)}`, onclick: () => this.spans[i].scrollIntoView({ block: "center" }) }))),
    );
    this.color();
  }

  button(place, note = "") {
    const button = make("button", { textContent: this.name(place) + note, onclick: () => this.show(place) });
    button.dataset.unit = place;
    return button;
  }

  memory(place) {
    const gate = this.head.gates[this.head.keeps];
    return gate ? 1 / Math.max(1e-6, 1 - gate.mean[place]) : NaN;
  }

  drawList() {
    const order = $(this.root, "sort").value, wanted = $(this.root, "search").value.trim().toLowerCase();
    let units = Array.from({ length: this.units }, (_, place) => place), note = () => "";
    const ranking = this.head.rankings.find((r) => order === "for " + r.name);
    if (ranking) {
      units = ranking.units.map((row) => row[0]);
      note = (place) => " " + ranking.units.find((row) => row[0] === place)[1].toFixed(3);
    } else if (order === "memory") {
      units.sort((a, b) => this.memory(b) - this.memory(a));
      note = (place) => " " + this.memory(place).toPrecision(3);
    } else if (order === "change") {
      const change = units.map((place) => this.of(place).reduce((sum, v, i, all) => sum + Math.abs(v - (i ? all[i - 1] : v)), 0) / this.count);
      units.sort((a, b) => change[b] - change[a]);
      note = (place) => " " + (change[place] / 127).toFixed(2);
    }
    const named = new Set(this.head.rankings.filter((r) => wanted && r.name.toLowerCase().includes(wanted)).flatMap((r) => r.units.map((row) => row[0])));
    units = units.filter((place) => !wanted || this.name(place).startsWith(wanted) || named.has(place));
    $(this.root, "list").replaceChildren(...units.map((place) => this.button(place, note(place))));
  }

  drawUnit() {
    const { head, place } = this, parts = [];
    const kept = this.memory(place);
    if (kept) parts.push(make("p", { textContent: `keeps ${(100 * head.gates[head.keeps].mean[place]).toFixed(1)} % of its state at a character: remembers about ${kept.toPrecision(3)} symbols` }));
    for (const [gate, { low, high }] of Object.entries(head.gates))
      parts.push(make("p", { textContent: `${gate} is below .1 at ${(100 * low[place]).toFixed(0)} %, above .9 at ${(100 * high[place]).toFixed(0)} % of the text` }));
    for (const r of head.rankings)
      for (const row of r.units)
        if (row[0] === place) parts.push(make("p", { textContent: `${r.name}: AUC ${row[1].toFixed(3)}, ${row[3] ? "low" : "high"} inside` }));
    for (const [end, label] of [[0, "highest"], [1, "lowest"]]) {
      parts.push(make("p", { textContent: "where it is " + label }));
      for (const [before, at, after] of head.snippets[place][end])
        parts.push(make("div", { className: "snippet" }, make("span", { textContent: before }), make("b", { textContent: at }), make("span", { textContent: after })));
    }
    $(this.root, "of-unit").replaceChildren(...parts);
    this.drawGates();
  }

  drawGates() {
    const gates = $(this.root, "gates"), { head, place } = this;
    if (gates.parentElement.open)
      gates.replaceChildren(...Object.entries(head.gates).map(([gate, { low, high }]) => scatter(low, high, place, gate)));
  }

  drawPatterns() {
    const line = (...cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
    const percent = (r) => ((100 * r.inside) / r.symbols).toFixed(1);
    $(this.root, "patterns").replaceChildren(
      ...this.head.rankings.map((r) => make("table", {}, make("caption", { textContent: `${r.name} (${percent(r)} % of the text)` }),
        line("unit", "AUC", "F1", "inside"), ...r.units.map(([place, auc, f1, low, threshold]) => line(this.button(place), auc.toFixed(3), f1.toFixed(2), `${low ? "<" : ">"} ${threshold.toFixed(2)}`)))),
      ...this.head.probes.map((p) => make("table", {}, make("caption", { textContent: `probe: ${p.name}, AUC ${p.auc.toFixed(3)}, ${p.units.length} units, C=${p.strength}` }),
        line("unit", "weight"), ...p.units.slice(0, 20).map(([place, weight]) => line(this.button(place), weight.toFixed(2))))),
    );
  }

  move(i) {
    const before = this.cursor;
    this.cursor = Math.max(0, Math.min(this.count - 1, i));
    this.spans[before].classList.remove("cursor");
    this.spans[this.cursor].classList.add("cursor");
    this.spans[this.cursor].scrollIntoView({ block: "nearest" });
    this.tell(this.cursor);
  }

  listen() {
    const { root } = this, text = $(root, "text"), placeOf = (node) => (node?.nodeType === 3 ? node.parentElement : node)?.closest?.(".c")?.place;
    text.addEventListener("mouseover", (e) => placeOf(e.target) !== undefined && this.tell(placeOf(e.target)));
    text.addEventListener("mouseup", (e) => {
      const chosen = getSelection(), ends = [placeOf(chosen.anchorNode), placeOf(chosen.focusNode)];
      if (!chosen.isCollapsed && ends[0] !== undefined && ends[1] !== undefined) this.select(Math.min(...ends), Math.max(...ends));
      else if (placeOf(e.target) !== undefined) this.click(placeOf(e.target));
    });
    text.addEventListener("keydown", (e) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (by && e.shiftKey) this.move(this.cursor + by);
      else if (e.key === "Enter") this.click(this.cursor);
      else return;
      e.preventDefault();
      e.stopPropagation();
    });
    $(root, "unit").addEventListener("change", (e) => {
      const found = this.parse(e.target.value);
      e.target.classList.toggle("bad", !found);
      if (!found) return;
      $(root, "array").selectedIndex = found[0];
      this.show(found[1]);
    });
    for (const name of ["array", "what", "scale"]) $(root, name).addEventListener("change", () => this.color());
    $(root, "threshold").addEventListener("input", () => this.span && this.select(...this.span));
    $(root, "with-rows").addEventListener("change", (e) => this.drawRows(e.target.checked));
    $(root, "previous").addEventListener("click", () => this.show(this.place - 1));
    $(root, "next").addEventListener("click", () => this.show(this.place + 1));
    $(root, "gates").parentElement.addEventListener("toggle", () => this.drawGates());
    $(root, "sort").addEventListener("change", () => this.drawList());
    $(root, "search").addEventListener("input", () => this.drawList());
    this.drawList();
  }
}

const SVG = "http://www.w3.org/2000/svg";

function drawing(width, height, label) {
  const svg = document.createElementNS(SVG, "svg"), add = (tag, attributes, text = "") => {
    const node = svg.appendChild(document.createElementNS(SVG, tag));
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
  };
  for (const [name, value] of Object.entries({ class: "plot", width, height, role: "img", "aria-label": label })) svg.setAttribute(name, value);
  return [svg, add];
}

function scatter(low, high, now, gate) {
  const [svg, add] = drawing(130, 140, `saturation of ${gate}`);
  add("path", { d: "M20 5 V115 H130" });
  add("text", { x: 24, y: 130 }, `${gate}: share below .1`);
  add("text", { x: 12, y: 100, transform: "rotate(-90 12 100)" }, "share above .9");
  low.forEach((x, i) => i !== now && add("circle", { cx: 20 + 108 * x, cy: 115 - 108 * high[i], r: 1.6 }));
  add("circle", { class: "now", cx: 20 + 108 * low[now], cy: 115 - 108 * high[now], r: 4 });
  return svg;
}

function curve(levels, most, label) {
  const [svg, add] = drawing(240, 70, label);
  add("path", { d: "M" + [...levels].map((v, i) => `${5 + (i * 230) / Math.max(1, levels.length - 1)} ${50 - (v / 255) * 45}`).join("L") });
  add("text", { x: 5, y: 64 }, `${label}; most ${most.toPrecision(2)} nats`);
  return svg;
}

document.addEventListener("keydown", (e) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[e.key];
  if (!by || e.altKey || e.ctrlKey || e.metaKey || /INPUT|SELECT/.test(e.target.tagName)) return;
  e.preventDefault();
  for (const run of runs) run.show(run.place + by);
});

const runs = [];
(async () => {
  for (const root of document.querySelectorAll(".run")) {
    const head = JSON.parse(new TextDecoder().decode(await unpacked("head-" + root.dataset.run)));
    head.signs = new Set(head.signs);
    runs.push(new Run(root, head, new Uint8Array(await unpacked("levels-" + root.dataset.run))));
  }
  document.body.dataset.ready = "true";
})();
