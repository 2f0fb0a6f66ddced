/* ---- making ---- */

const REPEATS = 5;       // runs of a comparison at most, of which the median counts
const REPEAT_MS = 2000;  // for which a maker is run again

/** Make a view's pictures again, for their times alone. */
async function repeat(view, signal) {
  const until = performance.now() + REPEAT_MS;
  while (view.runs.length < REPEATS && performance.now() + view.milliseconds() < until) {
    const { timings } = await (await ask("v1/images/generations", signal, "POST", bodyOf(view))).json();
    view.runs.push(sum(Object.entries(timings).filter(([stage]) => /^(expert-\d+|teacher)$/.test(stage)).map(([, ms]) => ms)));
  }
}

let models = [], model = null, running = null, shown = null;
const past = [];

async function makePictures(view, signal) {
  const { prompt, n, seed, size } = view.request;
  const body = { model: view.id, prompt, n, seed, stream: true, step_previews: true };
  if (size) body.size = size;
  const answer = await ask("v1/images/generations", signal, "POST", body);
  const gap = calm.matches ? 0 : Math.min(160, PLAY / view.plan.length);
  const final = [];
  let due = 0, finished = false;
  for await (const event of events(answer)) {
    if (event.error) throw new Problem(event.error.message, event.error.param);
    if (event.type === "image_generation.step" && view.tileOf.has(event.step)) {
      if (due > performance.now()) await wait(due - performance.now(), signal);
      due = performance.now() + gap;
    }
    aborted(signal);
    if (event.type === "image_generation.step") view.step(event);
    else if (event.type === "image_generation.completed" && final.push(event.b64_json) === n) {
      if (due > performance.now()) await wait(due - performance.now(), signal);
      view.done({ ...event, pictures: final });
      finished = true;
    }
  }
  if (!finished) throw new Problem("The server ended its answer before the pictures were made.");
}

async function makeVideo(view, signal) {
  const { prompt, seed, size } = view.request;
  const body = { model: view.id, prompt, seed };
  if (size) body.size = size;
  let job = await (await ask("v1/videos", signal, "POST", body)).json();
  const path = `v1/videos/${encodeURIComponent(job.id)}`;
  try {
    while (job.status !== "completed") {
      if (job.status === "failed") throw new Problem(job.error?.message || "The video could not be made.");
      view.progress(job.progress || 0);
      await wait(400, signal);
      job = await (await ask(path, signal)).json();
    }
    view.progress(100);
    view.film(await (await ask(`${path}/content`, signal)).blob(), job);
  } finally {  // it is here, or nobody wants it any more
    ask(path, new AbortController().signal, "DELETE").catch(() => {});
  }
}

function notice(text, { quiet = false, cancel = false, again = null } = {}) {
  $("notice").hidden = !text;
  $("notice").classList.toggle("calm", quiet);
  $("notice-text").textContent = text;
  $("cancel").hidden = !cancel;
  $("again").hidden = !again;
  $("again").onclick = again;
}

const FIELDS = { model: "model", prompt: "text", n: "n", size: "size", seed: "seed", key: "key" };

function blame(param, message) {
  const field = param === "prompt" && !$("pick-field").hidden ? $("pick-field") : $(FIELDS[param]);
  $(`${param}-wrong`).textContent = message;
  $(`${param}-wrong`).hidden = false;
  field.setAttribute("aria-invalid", "true");
  if (field.focus && field.offsetParent && field.tagName !== "FIELDSET") field.focus();
}

function forgive() {
  notice("");
  for (const [param, id] of Object.entries(FIELDS)) {
    $(`${param}-wrong`).hidden = true;
    for (const field of [$(id), $("pick-field")]) field.removeAttribute("aria-invalid");
  }
}

function complain(error, again) {
  announce(error.message);
  if (error.status === 401) {
    $("form").hidden = false;
    $("form").classList.toggle("locked", !model);
    $("make").textContent = model ? "Make" : "Go on";
    $("key-field").hidden = false;
    blame("key", sessionStorage.getItem(KEY) ? "The server does not know this key." : "This server asks for a key.");
    return;
  }
  const param = error.param in FIELDS ? error.param : null;
  if (param && !$("form").hidden) {
    blame(param, error.message);
    if ($(`${param}-wrong`).offsetParent) return;
  }
  notice(error.message, { again });
}

function readForm() {
  const picked = $("picker").querySelector(":checked");
  const request = {
    prompt: model.raydmd.prompts ? picked?.value ?? "" : $("text").value.trim(),
    n: model.raydmd.kind === "video" ? 1 : Number($("n").value), seed: $("seed").value === "" && !$("seed").validity.badInput ? newSeed() : Number($("seed").value),
    size: $("size-field").hidden ? null : $("size").value, compare: !$("compare-field").hidden && $("compare").checked,
  };
  let fine = true;
  const wrong = (param, message) => { if (fine) announce(message); fine = false; blame(param, message); };
  if (!request.prompt) wrong("prompt", "Say what to make.");
  const { limits } = model.raydmd;
  if (request.prompt.length > limits.prompt_characters) wrong("prompt", `At most ${limits.prompt_characters} characters, not ${request.prompt.length}.`);
  if (!Number.isInteger(request.n) || request.n < 1 || request.n > limits.n) wrong("n", `A whole number, at least 1 and at most ${limits.n}.`);
  if ($("seed").validity.badInput || !Number.isSafeInteger(request.seed) || request.seed < 0) wrong("seed", "A whole number from 0 on, or nothing for a random one.");
  return fine ? request : null;
}

function writeForm(request) {
  if (model.raydmd.prompts) {
    for (const radio of $("picker").querySelectorAll("input")) radio.checked = radio.value === request.prompt;
  } else $("text").value = request.prompt;
  $("n").value = request.n;
  $("seed").value = request.seed;
  if (request.size) $("size").value = request.size;
  $("compare").checked = request.compare;
}

function writeHash(request) {
  const parts = new URLSearchParams({ prompt: request.prompt, seed: request.seed });
  if (request.n !== 1) parts.set("n", request.n);
  if (request.size) parts.set("size", request.size);
  if (request.compare) parts.set("teacher", "1");
  if (models.length > 1) parts.set("model", model.id);
  if (location.hash !== `#${parts}`) history.pushState(null, "", `#${parts}`);
}

/** Fill the form from the address; return whether it says what to make. */
function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("prompt")) return false;
  const named = models.find((one) => one.id === parts.get("model"));
  if (named && named !== model) { $("model").value = named.id; choose(named); }
  writeForm({ prompt: parts.get("prompt"), seed: parts.get("seed") ?? "", n: parts.get("n") ?? 1, size: parts.get("size"), compare: parts.has("teacher") });
  const knows = !model.raydmd.prompts || model.raydmd.prompts.includes(parts.get("prompt"));
  if (!knows) blame("prompt", `'${parts.get("prompt")}' is not a prompt that this model knows.`);
  return knows;
}

/** Show views one beside the other. */
function lay(views) {
  shown = views;
  $("runs").classList.toggle("paired", views.length > 1);
  $("runs").replaceChildren(...views.map((view) => view.node));
}

function compareTimes(views) {
  const [student, teacher] = views;
  const most = Math.max(...views.map((view) => view.milliseconds()));
  const by = (view) => view.video ? view.milliseconds() : view.networks();
  const ratio = by(teacher) / by(student);
  views.forEach((view) => view.bar(most));
  $("ratio").textContent = `${number(ratio)}×`;
  const times = `${count(teacher.total, "step")} in ${time(by(teacher))} against ${count(student.total, "step")} in ${time(by(student))}`;
  const runs = (view) => view.runs.length === 1 ? "one run" : `${view.runs.length} runs`;
  const how = `counting the networks alone, medians of ${runs(teacher)} and ${runs(student)}`;
  const than = ratio >= 1 ? `The teacher took ${number(ratio)} times as long` : `The teacher took only ${number(ratio)} times as long`;
  $("verdict-text").textContent = `${than} for the same prompt and seed: ${times}${student.video ? "" : `, ${how}`}.`;
  $("verdict").hidden = false;
  return than;
}

async function make() {
  stop();
  forgive();
  if (!$("key-field").hidden && $("key").value) sessionStorage.setItem(KEY, $("key").value);
  if (!model) { load(); return; }
  const request = readForm();
  if (!request) return;
  writeHash(request);
  const mine = running = new AbortController();
  const views = [new View(model, request, "student")];
  if (request.compare) views.push(new View(model, request, "teacher"));
  const before = shown;
  lay(views);
  $("verdict").hidden = true;
  $("stop").hidden = false;
  mark(null);
  announce("Making …");
  const top = $("results").getBoundingClientRect().top;
  if (top > innerHeight * 0.5) $("results").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
  try {
    for (const view of views) { // one after the other, so that neither takes the other's time
      view.start();
      await (view.video ? makeVideo : makePictures)(view, mine.signal);
    }
    if (views.length > 1 && !views[0].video) {
      announce("Measuring …");
      for (const view of views) await repeat(view, mine.signal);
    }
    $("key-field").hidden = true;
    const than = views.length > 1 ? compareTimes(views) + "." : `In ${time(views[0].milliseconds())}.`;
    announce(`Made ${count(request.n, model.raydmd.kind === "video" ? "video" : "picture")} of ${request.prompt}, seed ${request.seed}. ${than}`);
    remember(request, views);
  } catch (error) {
    if (error.name === "AbortError") { if (running === mine || running === null) announce("Stopped."); }
    else if (error instanceof Problem) complain(error, error.status === 0 ? () => make() : null);
    else throw error;
    if (running === mine && !views[0].steps.length && before) lay(before);
  } finally {
    views.forEach((view) => view.end());
    if (running === mine) finish();
  }
}

function finish() {
  running = null;
  if (document.activeElement === $("stop")) $("make").focus();
  $("stop").hidden = true;
}

function stop() {
  if (!running) return;
  running.abort();
  finish();
  notice("");
}

