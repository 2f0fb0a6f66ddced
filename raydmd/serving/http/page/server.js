/* ---- the server ---- */

class Problem extends Error {
  constructor(message, param = null, status = 0) { super(message); this.param = param; this.status = status; }
}

function wait(ms, signal) {
  return new Promise((resolve, reject) => {
    aborted(signal);
    const stop = () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", stop); resolve(); }, ms);
    signal.addEventListener("abort", stop, { once: true });
  });
}

function retrySeconds(header) {
  if (!header) return null;
  const seconds = Number.isFinite(Number(header)) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}

/** Ask the server; a busy one is asked again when it says, until the signal aborts. */
async function ask(path, signal, method = "GET", body = null) {
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
      aborted(signal);
      throw new Problem("The server cannot be reached. Is it running, and is the network there?");
    }
    if (answer.ok) return answer;
    let said = {};
    try { said = (await answer.json()).error || {}; } catch (error) { aborted(signal); }
    const message = said.message || `The server answered ${answer.status} ${answer.statusText}`;
    const seconds = retrySeconds(answer.headers.get("Retry-After"));
    if ((answer.status !== 429 && answer.status !== 503) || seconds === null) throw new Problem(message, said.param, answer.status);
    const why = answer.status === 429 ? "The server is busy" : "The server is not ready";
    announce(`${why}, trying again in ${count(seconds, "second")}.`);
    for (let left = seconds; left > 0; left -= 1) {
      notice(`${why}, trying again in ${left} s.`, { quiet: true, cancel: true });
      await wait(1000, signal);
    }
    notice("");
  }
}

/** Yield the events of a stream of server-sent events, as objects. */
const BLANK = /\r?\n\r?\n/;

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let chunks = [], seam = "";  // of an event that is not whole yet, and their last characters: events are megabytes
  for (;;) {
    let part;
    try { part = await reader.read(); } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The connection broke while the pictures were being made.");
    }
    if (part.done) return;
    chunks.push(part.value);
    const seen = seam + part.value;
    seam = seen.slice(-3);
    if (!BLANK.test(seen)) continue;
    const blocks = chunks.join("").split(BLANK);
    chunks = [blocks.pop()];
    seam = chunks[0].slice(-3);
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

