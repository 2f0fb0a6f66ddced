/* ---- earlier results ---- */

function remember(request, views) {
  const first = views[0];
  const label = `${request.prompt}, seed ${request.seed}${request.n > 1 ? `, ${request.n} pictures` : ""}${views.length > 1 ? ", with the teacher" : ""}`;
  const frame = el("span", { className: `frame${first.node.classList.contains("pixels") ? " pixels" : ""}`, style: first.node.style.cssText },
    first.video ? el("video", { src: first.film_url, muted: true }) : el("img", { src: source(first.final[0]), alt: "" }));
  const button = el("button", { type: "button", title: label, "aria-label": `Show again: ${label}` }, frame, el("b", { textContent: request.prompt }), el("span", { className: "soft", textContent: `seed ${request.seed}` }));
  const entry = { request, views, model: first.model, button };
  button.addEventListener("click", () => restore(entry));
  const same = past.findIndex((one) => one.button.title === label && one.model === entry.model);
  if (same >= 0) past.splice(same, 1)[0].button.remove();
  past.unshift(entry);
  $("strip").prepend(button);
  for (const old of past.splice(KEPT)) {
    old.button.remove();
    old.views.forEach((view) => view.film_url && URL.revokeObjectURL(view.film_url));
  }
  $("history").hidden = past.length < 2;
  mark(entry);
}

function mark(entry) {
  for (const one of past) one === entry ? one.button.setAttribute("aria-current", "true") : one.button.removeAttribute("aria-current");
}

function restore(entry) {
  stop();
  forgive();
  if (entry.model !== model) { $("model").value = entry.model.id; choose(entry.model); }
  writeForm(entry.request);
  writeHash(entry.request);
  lay(entry.views);
  $("verdict").hidden = true;
  if (entry.views.length > 1) compareTimes(entry.views);
  mark(entry);
  announce(`Shown again: ${entry.button.title}.`);
}

