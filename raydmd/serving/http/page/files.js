/* ---- full size, files, copies ---- */

let looked = null; // the view and the number of the picture that is shown in full size

/** Show a picture in its full size: pixel by pixel, small ones enlarged by a whole factor. */
function look(view, i) {
  const img = view.pictures.querySelectorAll("img")[i], large = $("viewer-img");
  looked = [view, i];
  large.onload = () => {
    const room = Math.min((innerWidth - 60) / large.naturalWidth, (innerHeight - 140) / large.naturalHeight);
    const factor = view.node.classList.contains("pixels") ? Math.max(1, Math.floor(room)) : 1;
    large.style.cssText = `width:${factor * large.naturalWidth}px;height:${factor * large.naturalHeight}px;${factor > 1 ? "image-rendering:pixelated" : ""}`;
    const times = factor > 1 ? `, ${factor} times as large` : "";
    $("viewer-text").textContent = `${img.alt} · ${large.naturalWidth} × ${large.naturalHeight}${times}`;
  };
  large.src = img.src;
  large.alt = img.alt;
  for (const id of ["viewer-back", "viewer-on"]) $(id).hidden = view.request.n < 2;
  $("viewer-save").href = img.src;
  if (!$("viewer").open) $("viewer").showModal();
}

function turn(by) {
  if (!looked) return;
  const [view, i] = looked, { n } = view.request;
  if (n < 2) return;
  view.follow((i + by + n) % n);
  look(view, (i + by + n) % n);
}

function bytes(url) { return Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0)); }

/** Return a picture's file; one that is shown larger than it is, as large as it is shown. */
async function shownFile(img) {
  await img.decode();
  const width = Math.round(img.clientWidth), height = Math.round(img.clientHeight);
  const kind = img.src.slice(5, img.src.indexOf(";"));
  const fit = Math.min(width / img.naturalWidth, height / img.naturalHeight);
  if (fit <= 1) return new Blob([bytes(img.src)], { type: kind });
  const canvas = el("canvas", { width: Math.round(fit * img.naturalWidth), height: Math.round(fit * img.naturalHeight) }), context = canvas.getContext("2d");
  context.imageSmoothingEnabled = getComputedStyle(img).imageRendering !== "pixelated";
  context.drawImage(img, 0, 0, canvas.width, canvas.height);
  const drawn = await new Promise((resolve) => canvas.toBlob(resolve, kind));
  return kind === "image/png" ? withTexts(new Uint8Array(await drawn.arrayBuffer()), bytes(img.src)) : drawn;
}

/** Return a PNG with what another says of itself: its text chunks, which come behind the first one. */
function withTexts(png, other) {
  const texts = [], view = new DataView(other.buffer);
  for (let at = 8; at + 12 <= other.length;) {
    const size = view.getUint32(at) + 12, kind = String.fromCharCode(...other.subarray(at + 4, at + 8));
    if (kind === "tEXt" || kind === "iTXt") texts.push(other.subarray(at, at + size));
    at += size;
  }
  return new Blob([png.subarray(0, 33), ...texts, png.subarray(33)], { type: "image/png" });
}

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function crc32(data) {
  let crc = -1;
  for (const byte of data) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

/** Return files, [name, bytes] each, as a ZIP archive; they are compressed already. */
function zip(files) {
  const parts = [], index = [];
  let at = 0;
  const record = (size, fields) => {
    const view = new DataView(new ArrayBuffer(size));
    for (const [place, width, value] of fields) width === 2 ? view.setUint16(place, value, true) : view.setUint32(place, value, true);
    return new Uint8Array(view.buffer);
  };
  for (const [name, data] of files) {
    const title = new TextEncoder().encode(name), size = data.length, crc = crc32(data);
    parts.push(record(30, [[0, 4, 0x04034b50], [4, 2, 20], [6, 2, 0x800], [12, 2, 33], [14, 4, crc], [18, 4, size], [22, 4, size], [26, 2, title.length]]), title, data);
    index.push(record(46, [[0, 4, 0x02014b50], [4, 2, 20], [6, 2, 20], [8, 2, 0x800], [14, 2, 33], [16, 4, crc], [20, 4, size], [24, 4, size], [28, 2, title.length], [42, 4, at]]), title);
    at += 30 + title.length + size;
  }
  const length = sum(index.map((part) => part.length));
  const end = record(22, [[0, 4, 0x06054b50], [8, 2, files.length], [10, 2, files.length], [12, 4, length], [16, 4, at]]);
  return new Blob([...parts, ...index, end], { type: "application/zip" });
}

const root = () => new URL(".", location.href).href.replace(/\/$/, "");
const locked = () => sessionStorage.getItem(KEY) !== null; // then a key is sent, which copies name and do not tell

/** Return the body that asks for a view's pictures. */
function bodyOf(view) {
  const { prompt, n, seed, size } = view.request;
  return { model: view.id, prompt, ...(view.video ? {} : { n }), seed, ...(size ? { size } : {}) };
}

function curlOf(view) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = locked() ? ` \\\n  -H "Authorization: Bearer $RAYDMD_API_KEY"` : "";
  const route = view.video ? "v1/videos" : "v1/images/generations";
  return `curl ${quoted(`${root()}/${route}`)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(bodyOf(view)))}\n`;
}

function pythonOf(view) {
  const { seed, ...fields } = bodyOf(view);
  const given = [...Object.entries(fields).map(([name, value]) => `${name}=${JSON.stringify(value)}`), `extra_body={"seed": ${seed}}`].join(", ");
  const key = locked() ? 'os.environ["RAYDMD_API_KEY"]' : '"none"';
  const start = `import base64\nimport os\nfrom pathlib import Path\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${root()}/v1`)}, api_key=${key})\n`;
  return start + (view.video
    ? `video = client.videos.create_and_poll(${given})\nPath("video.mp4").write_bytes(client.videos.download_content(video.id).read())\n`
    : `made = client.images.generate(${given})\nfor number, one in enumerate(made.data):\n    Path(f"picture-{number}.png").write_bytes(base64.b64decode(one.b64_json))\n`);
}

async function copy(text, name) {
  try { await navigator.clipboard.writeText(text); } catch (error) { // without https, browsers have none
    const area = el("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce(`Copied as ${name}.`);
  notice(`Copied as ${name}.`, { quiet: true });
}

