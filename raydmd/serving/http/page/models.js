/* ---- what the server offers ---- */

/** Set the form up for a model. */
function choose(one) {
  model = one;
  const card = one.raydmd, experts = new Set(card.steps.map((s) => s.made_by)).size, short = card.prompts?.every((p) => p.length < 4);
  document.title = `${one.id} – raydmd`;
  $("name").textContent = one.id;
  $("about").textContent = `${card.kind === "video" ? `Videos of ${card.frames} frames` : "Pictures"} from noise in ${count(card.steps.length, "step")} by ${count(experts, "expert")}${experts > 1 ? ": the first makes the noisy steps, the last one finishes" : ""}.`;
  $("facts").textContent = `raydmd · ${card.family} · ${words(card.layout)} · weights ${card.revision}`;
  $("pick-field").hidden = !card.prompts;
  $("text-field").hidden = !!card.prompts;
  $("n-field").hidden = card.kind === "video";
  $("n").value = card.prompts && card.kind === "image" ? Math.min(4, card.limits.n) : 1;
  $("n").max = card.limits.n;
  $("text").maxLength = card.limits.prompt_characters;
  if (card.prompts) {
    const digits = card.prompts.every((p) => /^\d$/.test(p));
    $("pick-legend").textContent = digits ? "Digit" : "Prompt";
    $("digits-hint").hidden = !digits;
    $("picker").classList.toggle("long", !short);
    $("picker").replaceChildren(...card.prompts.map((prompt, i) => el("label", {}, el("input", { type: "radio", name: "prompt", value: prompt, checked: i === 0 }), el("span", { textContent: prompt }))));
  } else $("digits-hint").hidden = true;
  $("size").replaceChildren(...card.sizes.map((size) => el("option", { value: size, textContent: size.replace("x", " × ") })));
  $("size-field").hidden = card.sizes.length < 2;
  $("compare-field").hidden = !card.teacher;
  if (card.teacher) $("compare-note").textContent = `the same seed in ${count(card.teacher.steps, "step")} with guidance`;
  lay([new View(one, { prompt: "", n: Number($("n").value), seed: 0, size: null }, "student")]);
  $("verdict").hidden = true;
}

async function load() {
  notice("");
  const mine = running = new AbortController();
  try {
    const list = await (await ask("v1/models", mine.signal)).json();
    const teachers = new Set(list.data.map((one) => one.raydmd?.teacher?.id));
    models = list.data.filter((one) => one.raydmd && !teachers.has(one.id) && !one.raydmd.alias_of);
    if (!models.length) throw new Problem("The server has no model to make pictures with.");
  } catch (error) {
    $("about").textContent = "What few-step generators make of noise.";
    if (error.name === "AbortError") notice("Stopped.", { quiet: true, again: load }); else complain(error, load);
    return;
  } finally { if (running === mine) running = null; }
  $("key-field").hidden = true;
  $("form").hidden = false;
  $("form").classList.remove("locked");
  $("make").textContent = "Make";
  $("model").replaceChildren(...models.map((one) => el("option", { value: one.id, textContent: one.id })));
  $("model-field").hidden = models.length < 2;
  choose(models[0]);
  if (readHash()) make();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); make(); });
$("model").addEventListener("change", () => choose(models.find((one) => one.id === $("model").value)));
$("stop").addEventListener("click", stop);
$("cancel").addEventListener("click", stop);
$("no-seed").addEventListener("click", () => { $("seed").value = ""; announce("A random seed each time."); });
$("viewer-close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("viewer-back").addEventListener("click", () => turn(-1));
$("viewer-on").addEventListener("click", () => turn(1));
$("viewer-save").addEventListener("click", (event) => {
  event.preventDefault();
  const img = $("viewer-img");
  shownFile(img).then((file) => download(file, looked[0].fileName(looked[1], img.src)));
});
$("viewer").addEventListener("keydown", (event) => { if (event.key === "ArrowLeft") turn(-1); else if (event.key === "ArrowRight") turn(1); });
$("picker").addEventListener("keydown", (event) => {
  const rows = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!rows || $("picker").classList.contains("long")) return;
  event.preventDefault(); // left and right are the browser's own
  const all = [...$("picker").querySelectorAll("input")], columns = getComputedStyle($("picker")).gridTemplateColumns.split(" ").length;
  const next = all[all.indexOf(event.target) + rows * columns];
  if (next) { next.checked = true; next.focus(); }
});
document.addEventListener("keydown", (event) => {
  if ($("viewer").open) return; // it has keys of its own
  if (event.key === "Escape") { stop(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || $("form").hidden) return;
  const at = event.target, typing = at.matches("textarea, select, input:not([type=radio]):not([type=checkbox])");
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && (at === $("text") || at === document.body)) { event.preventDefault(); make(); }
  else if (!typing && model && event.key.length === 1) {
    const radio = [...$("picker").querySelectorAll("input")].find((one) => one.value === event.key);
    if (radio) { radio.checked = true; radio.focus(); event.preventDefault(); }
  }
});
addEventListener("popstate", () => {
  if (!model) return;
  stop();
  forgive();
  if (!readHash()) return;
  make();
});
load();
