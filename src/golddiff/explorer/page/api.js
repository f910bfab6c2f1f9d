// Talks with the server: questions, and lines of JSON that go on while something is computed.
import { $, emit } from "./state.js";

const RETRY = 1500;
const HEARTBEAT = 5000;
let gone = false;

export class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function fetched(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost();
    throw new Problem(0, "the server is gone");
  }
  if (answer.ok) return answer;
  let detail = `the server answered ${answer.status}`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch { /* not JSON: the number has to do */ }
  throw new Problem(answer.status, detail);
}

// The answer; null if another question made this one idle.
export async function ask(path, options) {
  const answer = await fetched(path, options);
  return answer.status === 204 ? null : answer.json();
}

export function send(path, body) {
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

// Calls `onEvent` with each line; resolves after the last, rejects if the server breaks off.
export async function lines(path, onEvent, signal) {
  const reader = (await fetched(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = JSON.parse(part);
        ended ||= event.kind === "end";
        onEvent(event);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (ended) return;
  lost();
  throw new Problem(0, "the server is gone");
}

export function banner(text) {
  const shown = $("#banner");
  shown.hidden = !text;
  shown.textContent = text ?? "";
}

// The server does not answer: say so, and ask until it does.
function lost() {
  if (gone) return;
  gone = true;
  banner("The server is gone. Start golddiff serve again; this page waits for it.");
  emit("lost");
  setTimeout(retry, RETRY);
}

// A page that lies idle learns it too.
setInterval(() => {
  if (!gone && !document.hidden) fetch("/api/bank").catch(lost);
}, HEARTBEAT);

async function retry() {
  try {
    const answer = await fetch("/api/bank");
    if (!answer.ok) throw new Error();
    const info = await answer.json();
    gone = false;
    banner(null);
    emit("back", info);
  } catch {
    setTimeout(retry, RETRY);
  }
}
