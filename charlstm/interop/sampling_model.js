"use strict";
// An engine that is the model itself: its weights, and the equations of charlstm/model/cells/, a symbol at a time.
const SLICE = 25, EPSILON = 1e-5; // milliseconds of work between two pieces; of the layer norms
const sigmoid = (a) => 1 / (1 + Math.exp(-a));

class Matrix {
  constructor(data, rows, columns) {
    Object.assign(this, { data, rows, columns });
  }

  row(r) {
    return Float64Array.from(this.data.subarray(r * this.columns, (r + 1) * this.columns));
  }

  // The products of rows `first` to `last` with x.
  times(x, first = 0, last = this.rows) {
    const { data, columns } = this, found = new Float64Array(last - first), even = columns - (columns % 4);
    for (let r = first, at = first * columns; r < last; r++) {
      let a = 0, b = 0, c = 0, d = 0, i = 0;
      for (; i < even; i += 4, at += 4) {
        a += data[at] * x[i];
        b += data[at + 1] * x[i + 1];
        c += data[at + 2] * x[i + 2];
        d += data[at + 3] * x[i + 3];
      }
      for (; i < columns; i++, at++) a += data[at] * x[i];
      found[r - first] = a + b + c + d;
    }
    return found;
  }
}

// Weights by name: vectors are float32; the rows of a matrix are float16, or int8 with a float32 scale each.
function unpacked({ arrays, format }, buffer) {
  let at = 0;
  const found = {}, take = (Type, count) => new Type(buffer.slice(at, (at += count * Type.BYTES_PER_ELEMENT)));
  const halves = Float32Array.from({ length: 1 << 16 }, (_, bits) => {
    const exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024, sign = bits >> 15 ? -1 : 1;
    return sign * (exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14);
  });
  for (const [name, rows, columns] of arrays) {
    if (columns === undefined) {
      found[name] = take(Float32Array, rows);
      continue;
    }
    const data = new Float32Array(rows * columns);
    if (format === "int8") {
      const scales = take(Float32Array, rows), values = take(Int8Array, data.length);
      for (let r = 0, i = 0; r < rows; r++) for (const end = i + columns; i < end; i++) data[i] = scales[r] * values[i];
    } else {
      const values = take(Uint16Array, data.length);
      for (let i = 0; i < data.length; i++) data[i] = halves[values[i]];
    }
    found[name] = new Matrix(data, rows, columns);
  }
  return found;
}

function normalized(v, gain) {
  const mean = v.reduce((a, b) => a + b, 0) / v.length;
  const scale = 1 / Math.sqrt(v.reduce((a, b) => a + (b - mean) ** 2, 0) / v.length + EPSILON);
  return v.map((value, i) => gain[i] * (value - mean) * scale);
}

class Model {
  constructor(head, buffer) {
    this.head = head;
    this.weights = unpacked(head, buffer);
  }

  of(layer, name) {
    return this.weights[`cells.${layer}.${name}`];
  }

  // The state before anything was read: zeros, or what was learned.
  first() {
    return this.head.widths.map((width, layer) => {
      const begin = (name) => Float64Array.from(this.of(layer, `first.${name}`) ?? new Float64Array(width));
      return { h: begin("h"), c: begin("c") };
    });
  }

  // Reads a symbol: puts the new state into `state`, and returns the logits of the next one.
  read(id, state) {
    const { embedding, w_out, b_out } = this.weights;
    let x = embedding?.row(id), features = null;
    state.forEach((old, layer) => {
      let h = old.h;
      for (let round = 0; this.of(layer, `rounds.${round}.bias`); round++) [x, h] = this.gated(layer, round, x, h);
      const z = x ? this.of(layer, "w_x").times(x) : this.of(layer, "w_x").row(id);
      const now = this.step(layer, z, h, old), { zoneout, zoneout_cell } = this.head;
      const kept = (rate, before, after) => (rate ? after.map((value, i) => rate * before[i] + (1 - rate) * value) : after);
      state[layer] = { h: kept(zoneout, old.h, now.h), c: kept(zoneout_cell, old.c, now.c) };
      x = state[layer].h;
      features = features && this.head.skip ? features.map((value, i) => value + x[i]) : x;
    });
    return (w_out ?? embedding).times(features).map((value, i) => value + b_out[i]);
  }

  // A round of the mogrifier.
  gated(layer, round, x, h) {
    const [left, right, bias] = ["left", "right", "bias"].map((name) => this.of(layer, `rounds.${round}.${name}`));
    const inner = left.times(round % 2 ? x : h), scaled = round % 2 ? h : x;
    const gate = (right ? right.times(inner) : inner).map((a, i) => 2 * sigmoid(a + bias[i]));
    const product = scaled.map((value, i) => gate[i] * value);
    return round % 2 ? [x, product] : [product, h];
  }

  // The state of a layer after a symbol whose projection is z: `h` is what the products see, `old` the state before.
  step(layer, z, h, old) {
    const { cell, variant } = this.head, H = old.h.length, w_h = this.of(layer, "w_h");
    const b_x = this.of(layer, "b_x"), b_h = this.of(layer, "b_h");
    if (cell === "gru") {
      const q = w_h.times(h), a = (i) => z[i] + b_x[i];
      return { c: old.c, h: old.h.map((before, i) => {
        const r = sigmoid(a(i) + q[i] + b_h[i]), u = sigmoid(a(H + i) + q[H + i] + b_h[H + i]);
        return (1 - u) * Math.tanh(a(2 * H + i) + r * (q[2 * H + i] + b_h[2 * H + i])) + u * before;
      }) };
    }
    let q;
    if (cell === "mlstm") {
      const m = w_h.times(h, 4 * H).map((value, i) => value * z[4 * H + i]);
      q = w_h.times(m, 0, 4 * H);
    } else q = w_h.times(h);
    if (cell === "layer_norm_lstm") [z, q] = [normalized(z, this.of(layer, "norms.gain_x")), normalized(q, this.of(layer, "norms.gain_h"))];
    const a = q.map((value, i) => z[i] + value + b_x[i] + b_h[i]);
    if (cell === "rnn") return { c: old.c, h: a.map(variant === "relu" ? (value) => Math.max(0, value) : Math.tanh) };
    const c = old.c.map((before, i) => {
      const f = sigmoid(a[H + i]), let_in = sigmoid(a[i]);
      return f * before + (variant === "capped" ? Math.min(let_in, 1 - f) : let_in) * Math.tanh(a[2 * H + i]);
    });
    let seen = c;
    if (cell === "layer_norm_lstm") {
      const b_c = this.of(layer, "norms.b_c");
      seen = normalized(c, this.of(layer, "norms.gain_c")).map((value, i) => value + b_c[i]);
    }
    return { c, h: seen.map((value, i) => sigmoid(a[3 * H + i]) * Math.tanh(value)) };
  }
}

// A number from 0 to 1 that depends on the seed and the place in the text alone.
function uniform(seed, place) {
  const mix = (x) => {
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return (x ^ (x >>> 16)) >>> 0;
  };
  const first = mix((mix((seed + 0x9e3779b9) | 0) + Math.imul(place + 1, 0x9e3779b9)) | 0), second = mix((first ^ 0x85a308d3) | 0);
  return (first * 2 ** 21 + (second >>> 11)) / 2 ** 53;
}

function ranked(logits, count) {
  return Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b).slice(0, count);
}

// The symbol that `u`, from 0 to 1, means.
function choose(logits, temperature, topK, u) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  if (!temperature) return logits.indexOf(most);
  const ids = topK ? ranked(logits, topK) : Array.from(logits.keys());
  const shares = ids.map((id) => Math.exp((logits[id] - most) / temperature));
  let left = u * shares.reduce((a, b) => a + b, 0), place = 0;
  while (place < ids.length - 1 && (left -= shares[place]) >= 0) place++;
  return ids[place];
}

class LocalEngine {
  constructor(head, buffer) {
    Object.assign(this, { head, model: new Model(head, buffer), slow: true, read: [], logits: null, state: null });
    this.symbols = head.characters === null ? null : ["\ufffd", ...head.characters];
    this.ids = this.symbols && new Map(this.symbols.map((symbol, id) => [symbol, id]).slice(1));
    this.since = performance.now();
  }

  encode(text) {
    return this.ids ? Array.from(text, (symbol) => this.ids.get(symbol) ?? 0) : [...new TextEncoder().encode(text)];
  }

  // Symbols of a text that the model does not know, each once.
  unknown(text) {
    return this.ids ? [...new Set(text)].filter((symbol) => !this.ids.has(symbol)) : [];
  }

  // What is read before a text and not shown: as `launch.sample` does.
  before(prompt, seed) {
    const { separator } = this.head;
    if (separator.length || prompt) return separator;
    const newline = this.encode("\n");
    if (newline[0]) return newline;
    return [1 + Math.floor(uniform(seed, -1) * (this.symbols.length - 1))];
  }

  endsSeparator() {
    const { separator } = this.head, start = this.read.length - separator.length;
    return separator.length > 0 && start >= 0 && separator.every((id, i) => this.read[start + i] === id);
  }

  // How many symbols at the end may be the beginning of a separator.
  beginning() {
    const { separator } = this.head;
    let count = Math.max(0, separator.length - 1);
    while (count && !separator.slice(0, count).every((id, i) => this.read.at(i - count) === id)) count--;
    return count;
  }

  feed(id) {
    this.read.push(id);
    if (this.endsSeparator()) this.state = this.model.first(); // its last symbol is read from the first state
    this.logits = this.model.read(id, this.state);
    if (this.ids) this.logits[0] = -Infinity; // never drawn
  }

  async breathe() {
    await pause();
    this.since = performance.now();
  }

  isDue() {
    return performance.now() - this.since > SLICE;
  }

  // Reads ids from the first state, or goes on from where it is where that is on the way.
  async reach(ids, signal) {
    if (!this.state || this.read.length > ids.length || !this.read.every((id, i) => id === ids[i]))
      Object.assign(this, { read: [], state: this.model.first() });
    while (this.read.length < ids.length && !signal?.aborted) {
      this.feed(ids[this.read.length]);
      if (this.isDue()) await this.breathe();
    }
  }

  expected() {
    const most = this.logits.reduce((a, b) => Math.max(a, b)), shares = this.logits.map((value) => Math.exp(value - most));
    const total = shares.reduce((a, b) => a + b, 0);
    return ranked(this.logits, Math.min(BARS, this.logits.length)).map((id) => {
      const text = this.symbols ? this.symbols[id] : id < 0x80 ? String.fromCharCode(id) : "";
      return { text, label: text ? visible(text) : `⟦${id.toString(16).toUpperCase()}⟧`, p: shares[id] / total };
    });
  }

  async *write(prompt, { written, length, temperature, topK, seed, slowly, peeking, signal }) {
    const hidden = this.before(prompt, seed), made = [], utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    const shown = (ids) => this.symbols ? ids.map((id) => this.symbols[id]).join("") : utf8.decode(new Uint8Array(ids), { stream: true });
    this.since = performance.now();
    await this.reach([...hidden, ...this.encode(prompt + written)], signal);
    if (peeking) { // nothing is read that is not of the text: who goes on would have to read it all again
      if (!signal?.aborted) yield { text: "", next: this.expected() };
      return;
    }
    let text = "", taken = 0;
    for (let ended = false; made.length < length && !signal?.aborted && !ended; ) {
      const place = this.read.length - hidden.length, id = choose(this.logits, temperature, topK, uniform(seed, place));
      const last = made.length + 1 === length, next = slowly || last || this.isDue() ? this.expected() : null;
      this.feed(id);
      made.push(id);
      ended = this.endsSeparator();
      const end = Math.max(taken, made.length - (ended ? this.head.separator.length : last ? 0 : this.beginning()));
      text += shown(made.slice(taken, end));
      taken = end;
      if (!next && !ended) continue;
      yield { text, next, ended };
      text = "";
      await this.breathe();
    }
    if (text) yield { text };
  }
}

async function makeEngine(head) {
  const packed = Uint8Array.from(atob($("#weights").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new LocalEngine(head, await new Response(stream).arrayBuffer());
}
