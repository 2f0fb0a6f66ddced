"use strict";
const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const KEY = "raydmd-api-key";
const MANY = 8;          // steps, above which they are shown as small tiles
const TILES = 60;        // at most; of a teacher of more steps, some are shown
const PLAY = 1000;       // ms at most in which steps that came at once are shown one after the other
const KEPT = 24;         // results in the history

function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "style") made.style.cssText = value; // a style attribute would need 'unsafe-inline'
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const source = (b64) => `data:image/${b64.startsWith("/9j/") ? "jpeg" : b64.startsWith("UklG") ? "webp" : "png"};base64,${b64}`;
const level = (t) => String(Number(t.toFixed(t < 10 ? 2 : 1)));
const number = (x) => x.toFixed(x < 9.95 ? 1 : 0);
const time = (ms) => ms < 1000 ? `${number(ms)} ms` : `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const words = (maker) => maker.replace("-", " ");
const classOf = (maker) => /^expert-\d+$/.test(maker) ? `by-${(maker.slice(7) - 1) % 8 + 1}` : `by-${maker}`;
const sum = (list) => list.reduce((a, b) => a + b, 0);
const median = (list) => { const sorted = [...list].sort((a, b) => a - b), half = sorted.length >> 1; return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2; };
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
const across = (n) => Math.ceil(Math.sqrt(n));
const aborted = (signal) => { if (signal.aborted) throw new DOMException("stopped", "AbortError"); };
function announce(text) { $("live").textContent = text; }

