// The page: takes what is asked, has the engine write, and shows the text and what was expected as they come.  An engine
// comes from `makeEngine(head)`.  Its `async *write(prompt, options)` yields pieces {text, next, ended}: more text; what
// was expected in place of its last symbol, the most probable first, [{text, label, p}], `text` where that is a whole
// character; and whether the text ended by itself.  Options: written (the text after the prompt so far), length,
// temperature, topK, seed, slowly (a piece for each symbol), signal (of an AbortController).
const $ = (selector) => document.querySelector(selector), form = $("form"), field = form.elements;
const BARS = 10, SLOWLY = 130; // symbols shown; milliseconds each
const SIGNS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
const pause = (milliseconds = 0) => new Promise((done) => setTimeout(done, milliseconds));
const visible = (symbol) => SIGNS[symbol] ?? symbol.replace(/^[\0-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]$/, (c) =>
  `⟦${c.charCodeAt(0).toString(16).toUpperCase().padStart(2, "0")}⟧`);

let engine, running = null, prompt = "", written = "", seed = 0, ended = false;

function say(text, bad = false) {
  $(".status").textContent = text;
  $(".status").classList.toggle("bad", bad);
}

function showBars(next, chosen = null) {
  $(".bars").replaceChildren(...next.slice(0, BARS).map(({ text, label, p }) => {
    const button = document.createElement("button"), name = document.createElement("span"), share = document.createElement("small");
    name.textContent = label;
    share.textContent = p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`;
    button.append(name, share);
    button.type = "button";
    button.style.setProperty("--p", p);
    button.classList.toggle("chosen", chosen !== null && text === chosen);
    button.disabled = !!running || !text || ended;
    button.addEventListener("click", () => take(text));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function showText() {
  $(".prompt").textContent = prompt;
  $(".written").textContent = written;
}

function append(text) {
  const paper = $(".paper"), atEnd = paper.scrollHeight - paper.scrollTop - paper.clientHeight < 40, to = $(".written");
  written += text;
  if (to.lastChild) to.lastChild.appendData(text);
  else to.append(text);
  if (atEnd) paper.scrollTop = paper.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  $(".write").hidden = $(".on").hidden = !!controller;
  $(".stop").hidden = !controller;
  $(".on").disabled = ended || !written;
  $(".paper").classList.toggle("writing", !!controller);
}

function options(length) {
  return { written, length, temperature: +field.temperature.value, topK: Math.max(0, +field.topK.value), seed,
    slowly: field.slowly.checked, signal: running.signal };
}

// Has the engine write on; then shows what it expects at the end.
async function write() {
  const began = performance.now(), before = [...written].length, unknown = engine.unknown?.(prompt) ?? [];
  let problem = "";
  setRunning(new AbortController());
  say("Reading…");
  try {
    for await (const piece of engine.write(prompt, options(+field.count.value))) {
      append(piece.text);
      ended = !!piece.ended;
      if (piece.next) showBars(piece.next, [...piece.text].at(-1) ?? null);
      say("Writing…");
      if (field.slowly.checked) await pause(SLOWLY);
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  const count = [...written].length - before, speed = Math.round((1000 * count) / (performance.now() - began));
  setRunning(null);
  const words = [`${count.toLocaleString()} characters, ${speed.toLocaleString()} a second, seed ${seed}.`];
  if (ended) words.push("The text ended by itself.");
  if (unknown.length) words.push(`Read as unknown, as the model has no such symbol: ${unknown.map(visible).join(" ")}`);
  say(problem || words.join(" "), !!problem);
  if (!problem) await peek();
}

// Shows what is expected after the text: of one symbol more, which is not taken.
async function peek() {
  if (ended) return showBars([]);
  setRunning(new AbortController());
  let next = [];
  try {
    for await (const piece of engine.write(prompt, { ...options(1), slowly: false, peeking: true })) next = piece.next ?? next;
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
  setRunning(null);
  showBars(next);
}

// Puts a symbol that was chosen by hand into the text.
function take(symbol) {
  if (running || !engine) return;
  append(symbol);
  peek();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !engine) return;
  prompt = field.prompt.value;
  [written, ended] = ["", false];
  seed = field.seed.value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : +field.seed.value;
  showText();
  write();
});
field.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
field.temperature.addEventListener("input", () => (field.shown.value = (+field.temperature.value).toFixed(2).replace(/0$/, "")));
$(".on").addEventListener("click", () => running || write());
$(".stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());

(async () => {
  try {
    engine = await makeEngine(JSON.parse($("#head").textContent));
    $(".slowly").hidden = !engine.slow;
    $(".hint").textContent = "Probabilities of the model itself, before temperature and top-k. When it has stopped, press one to put it into the text.";
    $(".write").disabled = false;
    say("");
    if (engine.slow) await peek();
  } catch (error) {
    say(`This page cannot run here: ${error.message}`, true);
  }
  document.body.dataset.ready = "true";
})();
