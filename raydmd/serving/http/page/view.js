/* ---- one maker's way from noise to the pictures ---- */

class View {
  constructor(model, request, maker) {
    Object.assign(this, { model, request, maker, steps: [], spent: {}, runs: [], final: null, timings: null, selected: 0, followed: 0 });
    const card = model.raydmd;
    this.video = card.kind === "video";
    this.teacher = maker === "teacher";
    this.id = this.teacher ? card.teacher.id : model.id;
    this.total = this.teacher ? card.teacher.steps : card.steps.length;
    const tiles = Math.min(TILES, this.total);
    this.plan = this.teacher ? Array.from({ length: tiles }, () => ({ made_by: "teacher" })) : card.steps;
    this.tileOf = new Map(this.plan.map((_, i) => [Math.round((i + 1) * this.total / this.plan.length), i])); // by step
    this.top = this.teacher ? Math.max(1, ...card.steps.map((s) => s.t)) : Math.max(...this.plan.map((s) => s.t));
    this.build();
  }

  build() {
    const card = this.model.raydmd, [width, height] = (this.request.size || card.sizes[0]).split("x").map(Number);
    const { total } = this, many = total > MANY, n = this.request.n;
    const experts = [...new Set(this.plan.map((s) => s.made_by))];
    this.time = el("b");
    this.kind = el("span", { className: "soft", textContent: this.teacher
      ? `${count(total, "step")}, guidance ${[card.guidance_scale].flat().map(level).join(" and ")}`
      : `${count(total, "step")} by ${count(experts.length, "expert")}` });
    const keep = el("button", { type: "button", className: "link", textContent: "use again", title: "Put this seed into the form" });
    keep.addEventListener("click", () => { $("seed").value = this.request.seed; announce(`Seed ${this.request.seed} is used again.`); });
    this.asked = el("p", { className: "asked", hidden: !this.request.prompt }, el("b", { textContent: this.request.prompt }), ` · seed ${this.request.seed} · ${width} × ${height} `, keep);
    this.tools = el("div", { className: "tools" });
    this.pictures = el("div", { className: "pictures", style: `--across:${across(n)}` });
    this.told = el("p", { className: "told" });
    const makers = el("div", { className: "makers" });
    for (const expert of experts) {
      const mine = this.plan.filter((s) => s.made_by === expert);
      const span = `t ${level(mine[0].t ?? this.top)} → ${level(mine.at(-1).t_next ?? 0)}`;
      makers.append(el("span", { className: classOf(expert), style: `grid-column:span ${mine.length}`, title: words(expert) }, words(expert), el("small", { textContent: span })));
    }
    const numbers = [...this.tileOf.keys()];
    this.tiles = this.plan.map((step, i) => {
      const tile = el("span", { className: "tile" });
      const at = el("span", { className: "at" }, this.teacher ? "" : `${level(step.t)} → ${level(step.t_next)}`, el("b"));
      const button = el("button", { type: "button", disabled: true, "aria-pressed": "false", "data-step": numbers[i], "aria-label": `Step ${numbers[i]} of ${total} by ${words(step.made_by)}: not made yet` }, tile, at);
      button.addEventListener("click", () => this.select(i));
      return button;
    });
    const list = el("ol", { className: "steps" }, ...this.tiles.map((tile, i) => el("li", { className: classOf(this.plan[i].made_by), "data-made-by": this.plan[i].made_by }, tile)));
    list.setAttribute("aria-label", "Steps");
    this.axis = el("div", { className: "axis", role: "img", "aria-label": "Noise levels of the steps" });
    this.ticks = el("div", { className: "ticks", "aria-hidden": "true" });
    this.times = el("div", { className: "times" });
    const axis = el("div", {}, el("div", { className: "ends" }, el("span", { textContent: "noise" }), el("span", { textContent: "noise level t" }), el("span", { textContent: "picture" })), this.axis, this.ticks);
    const story = el("div", { className: "story" }, el("div", {}, makers, this.video ? null : list), this.video && this.teacher ? null : axis, this.times);
    this.node = el("article", { className: `panel run by-${this.maker}${many ? " many" : ""}${total > 4 ? " small" : ""}${width > 1.5 * height ? " wide" : ""}${Math.max(width, height) <= 64 ? " pixels" : ""}`, style: `--steps:${total};--shape:${width}/${height}`, "data-maker": this.maker, "aria-label": this.teacher ? "Teacher" : "Student" },
      el("header", {}, el("h2", { textContent: this.teacher ? "Teacher" : "Student" }), this.kind, this.time), this.asked,
      el("div", { className: "body" }, el("div", {}, this.pictures, this.told, this.tools), story));
    this.frames = Array.from({ length: n }, (_, i) => {
      const frame = el(this.video ? "span" : "button", { className: "frame" });
      if (!this.video) {
        frame.type = "button"; frame.disabled = true;
        if (n > 1) frame.setAttribute("aria-pressed", String(i === 0));
        frame.addEventListener("click", () => { if (n > 1) this.follow(i); look(this, i); });
      }
      const figure = el("figure", {}, frame, el("figcaption"));
      this.pictures.append(figure);
      return figure;
    });
    if (!this.teacher) this.plan.forEach((step) => this.segment(step, false));
    this.levels(this.teacher ? [this.top, 0] : [this.plan[0].t, ...this.plan.map((s) => s.t_next)]);
  }

  segment(step, done) {
    const made = el("i", { className: `${classOf(step.made_by)}${done ? " done" : ""}`, style: `left:${100 * (1 - step.t / this.top)}%;width:${100 * (step.t - step.t_next) / this.top}%` });
    this.axis.append(made);
  }

  /** Write the noise levels under the axis: first and last always, others where there is room. */
  levels(times) {
    const place = (t) => 100 * (1 - t / this.top);
    let last = place(times[0]);
    const shown = times.filter((t, i) => {
      const fits = i === 0 || i === times.length - 1 || (place(t) - last > 11 && 100 - place(t) > 11);
      if (fits) last = place(t);
      return fits;
    });
    this.ticks.replaceChildren(...shown.map((t, i) => el("span", { className: i && i === shown.length - 1 ? "last" : "", style: `left:${place(t)}%`, textContent: level(t) })));
  }

  start() { this.node.classList.add("going"); this.node.setAttribute("aria-busy", "true"); this.next(); }

  next() { this.tiles.forEach((tile, i) => tile.firstChild.classList.toggle("next", i === this.steps.length)); }

  step(event) {
    this.spent[event.made_by] = (this.spent[event.made_by] || 0) + 1000 * event.seconds;
    const i = this.tileOf.get(event.step), button = this.tiles[i];
    if (!button) { this.told.textContent = `Step ${event.step} of ${event.steps}`; return; }
    this.steps[i] = event;
    const ms = event.seconds * 1000;
    button.disabled = false;
    button.setAttribute("aria-label", `Step ${event.step} of ${event.steps} by ${words(event.made_by)}, noise level ${level(event.t)} to ${level(event.t_next)}, ${time(ms)}`);
    button.title = `${words(event.made_by)}: t ${level(event.t)} → ${level(event.t_next)}, ${time(ms)}`;
    button.parentNode.dataset.madeBy = event.made_by;
    button.parentNode.className = classOf(event.made_by);
    button.querySelector("b").textContent = time(ms);
    button.firstChild.replaceChildren(el("img", { src: source(event.pictures[this.followed]), alt: "" }));
    if (this.teacher) this.segment({ ...event, t: i ? this.steps[i - 1].t_next : event.t }, true); else this.axis.children[i].classList.add("done");
    this.select(i);
    this.next();
  }

  /** Show the steps of another of the pictures. */
  follow(i) {
    this.followed = i;
    this.frames.forEach((figure, at) => figure.firstChild.setAttribute("aria-pressed", String(at === i)));
    this.steps.forEach((step, at) => { this.tiles[at].querySelector("img").src = source(step.pictures[i]); });
    this.tell();
  }

  tell() {
    const { n } = this.request, done = this.selected === this.plan.length - 1 && this.final !== null, step = this.steps[this.selected];
    if (done) this.told.textContent = n > 1 ? `Finished; the steps are those of picture ${this.followed + 1}` : "Finished";
    else if (step) this.told.replaceChildren(el("i", { className: `dot ${classOf(step.made_by)}` }), `After step ${step.step} of ${step.steps}, by ${words(step.made_by)}`);
  }

  /** Show a step's pictures large; the last step's are the final ones once they are there. */
  select(i) {
    this.selected = i;
    this.tiles.forEach((tile, at) => tile.setAttribute("aria-pressed", String(at === i)));
    const last = i === this.plan.length - 1 && this.final !== null, step = this.steps[i];
    this.show(last ? this.final : step.pictures, last);
    this.tell();
  }

  show(pictures, final) {
    const { prompt, seed } = this.request;
    this.frames.forEach((figure, i) => {
      if (!pictures[i]) return;
      const url = source(pictures[i]);
      const what = `${prompt}, seed ${seed}${pictures.length > 1 ? `, picture ${i + 1} of ${pictures.length}` : ""}${this.teacher ? ", by the teacher" : ""}`;
      let img = figure.querySelector("img");
      if (!img) { img = el("img"); figure.firstChild.replaceChildren(img); }
      img.src = url; img.alt = final ? what : `${what}, unfinished`;
      figure.firstChild.disabled = false;
      const save = el("a", { href: url, download: this.fileName(i, url), textContent: "Save", "aria-label": `Save ${what}` });
      save.addEventListener("click", (event) => { event.preventDefault(); shownFile(img).then((file) => download(file, this.fileName(i, url))); });
      figure.lastChild.replaceChildren(...(final ? [save] : []));
    });
    this.tools.replaceChildren(...(final ? this.offers() : []));
  }

  /** Return a picture's file name; `url` tells its format. */
  fileName(i, url) {
    const { prompt, seed } = this.request;
    return `${`${this.id}-${prompt}-${seed}-${i + 1}`.replace(/[^\w.-]+/g, "_").slice(0, 100)}.${url.slice(11, url.indexOf(";"))}`;
  }

  /** What can be done with a result. */
  offers() {
    const button = (text, act) => { const made = el("button", { type: "button", className: "plain", textContent: text }); made.addEventListener("click", act); return made; };
    const all = button("Save all", async () => {
      const images = [...this.pictures.querySelectorAll("img")];
      const files = await Promise.all(images.map(async (img, i) => [this.fileName(i, img.src), new Uint8Array(await (await shownFile(img)).arrayBuffer())]));
      download(zip(files), this.fileName(0, images[0].src).replace(/-1\.\w+$/, ".zip"));
    });
    const copies = [["curl", curlOf], ["Python", pythonOf]].map(([name, text]) => button(`Copy as ${name}`, () => copy(text(this), name)));
    return [...(this.request.n > 1 && !this.video ? [all] : []), ...copies];
  }

  done(event) {
    this.final = event.pictures;
    this.timings = event.timings || {};
    this.batches = event.batches || {};
    this.revision = event.revision || "";
    this.runs = [sum(Object.values(this.spent))];
    this.end();
    if (this.steps.length) this.select(this.plan.length - 1); else this.show(this.final, true);
    this.bar(this.milliseconds());
  }

  end() {
    this.node.classList.remove("going"); this.node.removeAttribute("aria-busy");
    this.tiles.forEach((tile) => tile.firstChild.classList.remove("next"));
  }

  milliseconds() { return this.timings.total ?? sum(Object.values(this.timings)); }

  /** ms in the networks alone, without what the pictures of the steps cost: the median of all runs. */
  networks() { return median(this.runs); }

  /** Draw the stages' times; `most` ms fill the width. */
  bar(most) {
    const { total: _, ...stages } = this.timings;
    let previews = 0;
    const parts = [];
    for (const [stage, ms] of Object.entries(stages)) {
      const mine = this.spent[stage] || 0;
      const network = mine > 0 && mine < ms ? mine : ms;
      previews += ms - network;
      parts.push([stage, classOf(stage), words(stage), network]);
    }
    const rank = (stage) => ({ queue: 0, encode: 1, decode: 3 })[stage] ?? 2;
    parts.sort((a, b) => rank(a[0]) - rank(b[0]) || a[0].localeCompare(b[0], "en", { numeric: true }));
    const rest = this.milliseconds() - sum(Object.values(stages));
    if (previews > 0.05) parts.push(["previews", "by-previews", "pictures of the steps", previews]);
    if (rest > 0.05) parts.push(["rest", "by-rest", "between the stages", rest]);
    const together = Math.max(0, ...Object.values(this.batches));
    this.time.textContent = time(this.milliseconds());
    this.times.replaceChildren(
      el("h3", { textContent: `Where the time went${together > this.request.n ? `, in a batch of ${together} with others` : ""}` }),
      el("div", { className: "bar", role: "img", style: `width:${Math.min(100, 100 * this.milliseconds() / most)}%`, "aria-label": parts.map((p) => `${p[2]} ${time(p[3])}`).join(", ") },
        ...parts.map(([stage, by, , ms]) => el("i", { className: by, style: `flex-grow:${ms}`, "data-stage": stage }))),
      el("div", { className: "parts" }, ...parts.map(([, by, name, ms]) => el("span", {}, el("i", { className: `dot ${by}` }), `${name} `, el("b", { textContent: time(ms) })))));
  }

  /** Show how far a video is, 0 to 100. */
  progress(percent) {
    if (!this.meter) { this.meter = el("progress", { max: 100, "aria-label": "Progress" }); this.told.replaceChildren(this.meter); }
    this.meter.value = percent;
    [...this.axis.children].forEach((part, i) => part.classList.toggle("done", percent >= 100 * (i + 1) / this.plan.length));
  }

  /** Show a job's video. */
  film(blob, job) {
    const url = URL.createObjectURL(blob), { prompt, seed } = this.request;
    this.film_url = url;
    const video = el("video", { src: url, controls: true, loop: true, muted: true, playsInline: true, "aria-label": `${prompt}, seed ${seed}` });
    video.autoplay = !calm.matches;
    this.frames[0].firstChild.replaceChildren(video);
    const file = `${this.id}-${prompt}-${seed}`.replace(/[^\w.-]+/g, "_").slice(0, 100);
    this.frames[0].lastChild.replaceChildren(el("a", { href: url, download: `${file}.mp4`, textContent: "Save" }));
    this.told.replaceChildren();
    this.tools.replaceChildren(...this.offers());
    this.timings = job.timings;
    this.batches = job.batches;
    this.bar(this.milliseconds());
    this.end();
  }
}

