"use strict";
// An engine that is the server which sent this page: completions, as they are streamed.
async function* events(body) {
  let rest = "";
  const decoder = new TextDecoder(), reader = body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    for (let end; (end = /\r?\n\r?\n/.exec(rest)); rest = rest.slice(end.index + end[0].length))
      for (const line of rest.slice(0, end.index).split(/\r?\n/))
        if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}

class RemoteEngine {
  constructor(head) {
    this.head = head;
    this.slow = false; // a piece is several symbols
    this.at = null; // a text that was written to its end, and the state that the server gave after it
  }

  async *write(prompt, { written, length, temperature, topK, seed, peeking, signal }) {
    if (!written) this.at = null;
    const whole = prompt + written, at = this.at && whole.startsWith(this.at.text) ? this.at : { text: "" };
    const asked = { model: this.head.name, prompt: whole.slice(at.text.length), max_tokens: length, temperature, seed, stream: true, logprobs: BARS };
    if (topK) asked.top_k = topK;
    if (at.state) asked.state = at.state;
    if (peeking) asked.stop = ""; // a separator that is drawn would be left out, with what else was expected
    else asked.return_state = true;
    const headers = { "Content-Type": "application/json" };
    const answer = await fetch(this.head.address, { method: "POST", headers, body: JSON.stringify(asked), signal });
    if (!answer.ok) {
      this.at = null; // the model may be another one by now
      const told = await answer.json().catch(() => null);
      throw new Error(told?.error?.message ?? told?.detail ?? `the server answered ${answer.status}`);
    }
    let text = whole;
    for await (const data of events(answer.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      const best = choice.logprobs?.top_logprobs?.at(-1);
      const next = best && Object.entries(best).map(([text, logarithm]) => ({
        text: [...text].length === 1 ? text : "", label: visible(text), p: Math.exp(logarithm) }));
      next?.sort((a, b) => b.p - a.p);
      text += choice.text;
      if (choice.state) this.at = { text, state: choice.state };
      yield { text: choice.text, next, ended: choice.finish_reason === "stop" };
    }
  }
}

const makeEngine = async (head) => new RemoteEngine(head);
