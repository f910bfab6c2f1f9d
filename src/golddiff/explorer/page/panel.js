// A run and its pictures: noisy image, posterior mean, the pixel under the cursor, the source map.
import { app, $, element, emit, on, say } from "./state.js";
import { Problem, ask, lines, send } from "./api.js";
import { count, number, seconds } from "./format.js";

const STEPS_OF_KEY = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const WORDS = { main: "", compare: "compared", without: "without some images" };

export class Panel {
  constructor(key, settings) {
    Object.assign(this, { key, settings, steps: [], total: settings.steps, state: "waiting", id: null, kept: new Map() });
    const root = $("#panel-template").content.firstElementChild.cloneNode(true);
    this.root = root;
    root.dataset.panel = key;
    for (const name of ["noisy", "mean", "map", "cursor", "mark", "pick", "badge", "message"]) this[name] = $(`.${name}`, root);
    this.cursorAt = null;
    this.listen();
    $("#panels").append(root);
    this.head();
  }

  get title() {
    const rows = this.settings.retrieval;
    return this.settings.method + (rows ? ` · ${rows}` : "");
  }

  get shown() {
    return this.steps[Math.min(app.index, this.steps.length - 1)];
  }

  head() {
    const left = this.settings.without;
    const lacking = left ? left.rows.length + left.labels.length : 0;
    $("h2", this.root).textContent = this.title;
    this.badge.hidden = this.key === "main";
    this.badge.textContent = lacking && this.rows ? `${count(app.info.rows - this.rowsOfBank())} removed` : WORDS[this.key];
    this.pick.setAttribute("aria-label", `Posterior mean of ${this.title}. Arrow keys move the pixel, Enter shows its sources.`);
  }

  rowsOfBank() {
    return this.settings.label == null ? this.rows : this.rows + app.info.rows - (app.info.classes.find((c) => c.label === this.settings.label)?.rows ?? this.rows);
  }

  async run(settings = this.settings) {
    this.stop();
    const mine = (this.controller = new AbortController());
    Object.assign(this, { settings, steps: [], total: settings.steps, state: "waiting", id: null });
    this.kept.clear();
    this.head();
    this.tell(null);
    emit("state", this);
    try {
      const made = await send("/api/runs", settings);
      if (this.controller !== mine) return;
      Object.assign(this, { id: made.id, rows: made.rows, state: "running" });
      this.head();
      emit("state", this);
      await lines(`/api/runs/${made.id}/steps`, (event) => this.controller === mine && this.take(event), mine.signal);
    } catch (error) {
      if (this.controller !== mine || error.name === "AbortError") return;
      this.state = error.status === 0 ? "lost" : "failed";
      this.tell(error.message);
    }
    if (this.controller === mine) emit("state", this);
  }

  // Forgets a run that is under way; its server side ends when nobody reads it.
  stop() {
    this.controller?.abort();
    this.controller = null;
  }

  async cancel() {
    if (this.state === "waiting") {
      this.stop();
      this.state = "cancelled";
      this.tell("Cancelled.");
      emit("state", this);
    } else if (this.state === "running") {
      await ask(`/api/runs/${this.id}`, { method: "DELETE" }).catch(() => {});
    }
  }

  take(event) {
    if (event.kind === "alive") {
      if (this.state === "running" && this.key === "main") say(waiting(event));
    } else if (event.kind === "step") {
      this.steps.push(event);
      this.total = event.count;
      emit("steps", this);
    } else {
      this.state = event.state;
      if (event.state === "cancelled") this.tell(`Cancelled after ${this.steps.length} of ${this.total} steps. Run starts it again.`);
      if (event.state === "failed") this.tell(event.message);
    }
  }

  tell(text) {
    this.message.hidden = !text;
    this.message.textContent = text ?? "";
  }

  // A question about this run. If the server has forgotten the run it is made again first.
  async question(path) {
    try {
      return await ask(`/api/runs/${this.id}/${path}`);
    } catch (error) {
      if (!(error instanceof Problem) || ![404, 410].includes(error.status)) throw error;
      say("The server has forgotten this run; running it again.");
      await this.run();
      return ask(`/api/runs/${this.id}/${path}`);
    }
  }

  // Questions are asked once for each step.
  asked(path) {
    if (!this.kept.has(path)) {
      const answer = this.question(path);
      this.kept.set(path, answer);
      answer.then((found) => found ?? this.kept.delete(path), () => this.kept.delete(path));
    }
    return this.kept.get(path);
  }

  draw() {
    const step = this.shown;
    this.root.classList.toggle("empty", !step);
    if (!step) return;
    this.noisy.src = `data:image/png;base64,${step.noisy}`;
    this.mean.src = `data:image/png;base64,${step.mean}`;
    this.noisy.alt = `Noisy image of step ${step.index + 1}`;
    this.mean.alt = `Posterior mean of step ${step.index + 1}, ${this.title}`;
    this.drawMarks();
  }

  drawMarks() {
    const chosen = app.pixel && app.active === this.key ? app.pixel : null;
    place(this.mark, chosen);
    place(this.cursor, document.activeElement === this.pick ? this.cursorAt : null);
  }

  fit(side) {
    const [, height, width] = app.info.shape;
    const zoom = side / Math.max(height, width);
    const whole = zoom >= 1 ? Math.floor(zoom) : zoom;
    for (const frame of this.root.querySelectorAll(".frame")) {
      frame.style.width = `${width * whole}px`;
      frame.style.height = `${height * whole}px`;
    }
  }

  listen() {
    this.pick.addEventListener("click", (event) => {
      if (!this.shown) return;
      const box = this.mean.getBoundingClientRect();
      const [, height, width] = app.info.shape;
      const y = Math.floor(((event.clientY - box.top) / box.height) * height);
      const x = Math.floor(((event.clientX - box.left) / box.width) * width);
      this.choose({ y: clamp(y, height), x: clamp(x, width) });
    });
    this.pick.addEventListener("keydown", (event) => this.key_(event));
    this.pick.addEventListener("focus", () => {
      const [, height, width] = app.info.shape;
      this.cursorAt ??= { y: height >> 1, x: width >> 1 };
      this.drawMarks();
    });
    this.pick.addEventListener("blur", () => this.drawMarks());
  }

  key_(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [, height, width] = app.info.shape;
    const move = STEPS_OF_KEY[event.key];
    if (move) {
      const far = event.shiftKey ? 4 : 1;
      this.cursorAt = { y: clamp(this.cursorAt.y + move[0] * far, height), x: clamp(this.cursorAt.x + move[1] * far, width) };
      this.drawMarks();
      say(`Pixel ${this.cursorAt.x}, ${this.cursorAt.y} (across, down)`);
    } else if (event.key === "Enter") {
      this.choose(this.cursorAt);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  choose(pixel) {
    this.cursorAt = pixel;
    app.active = this.key;
    app.pixel = pixel;
    emit("pixel");
  }
}

function waiting({ others, preparing }) {
  if (preparing) return "The server is preparing masks and compiled loops; the first steps wait for that …";
  return others ? `Computing a step, in turns with ${others} other ${others > 1 ? "tasks" : "task"} …` : "Computing a step …";
}

export function place(mark, pixel) {
  mark.hidden = !pixel;
  if (!pixel) return;
  const [, height, width] = app.info.shape;
  Object.assign(mark.style, {
    left: `${(100 * pixel.x) / width}%`,
    top: `${(100 * pixel.y) / height}%`,
    width: `${100 / width}%`,
    height: `${100 / height}%`,
  });
}

const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));

// The largest whole zoom at which every panel's two pictures fit beside each other.
export function fitPanels() {
  for (const panel of app.panels) {
    const pair = $(".pair", panel.root);
    const gap = parseFloat(getComputedStyle(pair).columnGap) || 0;
    if (pair.clientWidth) panel.fit(Math.min(288, (pair.clientWidth - gap) / 2));
  }
}

function drawReadout() {
  const step = app.panels[0]?.shown;
  if (!step) return;
  const entries = [
    ["step", `${step.index + 1} of ${step.count}`],
    ["noise σ / α", number(step.rho)],
    ["α", number(step.alpha)],
    ["σ", number(step.sigma)],
    ...(step.ess ? [["images, effective", number(step.ess.median)]] : []),
    [app.panels.length > 1 ? "times, left to right" : "time", app.panels.filter((panel) => panel.shown).map((panel) => seconds(panel.shown.seconds)).join(" · ")],
  ];
  $("#readout").replaceChildren(...entries.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

function drawAll() {
  for (const panel of app.panels) panel.draw();
  drawReadout();
}

on("steps", drawAll);
on("index", drawAll);
on("pixel", drawAll);
addEventListener("resize", fitPanels);
