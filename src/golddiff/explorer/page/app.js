// The page: settings, runs, scrubbing, keys.
import { app, $, emit, on, panelNamed, say } from "./state.js";
import { ask, banner } from "./api.js";
import { count } from "./format.js";
import { Panel, fitPanels } from "./panel.js";
import { closePixel, toggleMap } from "./sources.js";
import { removedSettings, undo } from "./removal.js";
import { cancelCheck, check } from "./check.js";
import "./chart.js";

const FRAME = 450; // milliseconds of a step while playing
const FIELDS = ["method", "retrieval", "label", "seed", "steps", "schedule", "sampler"];
let playing = null;

// ---- settings ----------------------------------------------------------------------------------------------------

const form = $("#settings");
const method = (name) => app.info.methods.find((found) => found.name === name);

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

function retrievals(select, field, name) {
  const known = method(name)?.retrievals ?? [];
  options(select, known.map((value) => [value, value]));
  select.disabled = !known.length;
  field.classList.toggle("idle", !known.length);
}

function chooseMethod() {
  retrievals($("#retrieval"), $("#retrieval-field"), form.method_.value);
  $("#about").textContent = method(form.method_.value).about;
}

function fill(info) {
  app.info = info;
  const [channels, height, width] = info.shape;
  const shown = info.display ? ` Shown: ${info.display}.` : "";
  $("#bank").textContent = `${info.name}: ${count(info.rows)} images of ${width} × ${height}${channels === 3 ? ", colour" : channels > 1 ? `, ${channels} channels` : ""}.${shown}`;
  document.title = `${info.name}: golddiff explorer`;
  options($("#method"), info.methods.map((found) => [found.name, found.name]));
  options($("#other"), [["", "nothing"], ...info.methods.map((found) => [found.name, found.name])]);
  options($("#label"), [["", "any"], ...info.classes.map((found) => [found.label, found.name])]);
  options($("#schedule"), info.schedules.map((name) => [name, name]));
  options($("#sampler"), info.samplers.map((name) => [name, name]));
  options($("#drop-class"), info.classes.map((found) => [found.label, found.name]));
  $("#label-field").hidden = $("#class-row").hidden = !info.classes.length;
  $("#steps").max = info.limits.steps;
  $("#statistics").value = info.statistics;
  $("#method").value = "golddiff";
  chooseMethod();
}

function settings() {
  const value = (name) => $(`#${name}`).value;
  return {
    method: value("method"),
    retrieval: value("retrieval") || null,
    label: value("label") === "" ? null : Number(value("label")),
    seed: Number(value("seed")),
    steps: Number(value("steps")),
    schedule: value("schedule"),
    sampler: value("sampler"),
    without: null,
  };
}

function remember() {
  const said = new URLSearchParams(FIELDS.map((name) => [name, $(`#${name}`).value]).filter(([, value]) => value !== ""));
  history.replaceState(null, "", `#${said}`);
}

// Settings in the address, as a link carries them; what is not known here is said and left at its default.
function recall() {
  const wrong = [];
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    const field = FIELDS.includes(name) && $(`#${name}`);
    const before = field && field.value;
    if (field) field.value = value;
    if (!field || field.value !== value || !field.checkValidity()) {
      wrong.push(`${name}=${value}`);
      if (field) field.value = before;
    }
    if (name === "method") chooseMethod();
  }
  if (wrong.length) banner(`The address asks for ${wrong.join(", ")}, which this bank or server does not have: the default is taken.`);
}

// ---- panels ------------------------------------------------------------------------------------------------------

function sidePanel(key, wanted) {
  const there = panelNamed(key);
  if (!wanted) {
    if (!there) return;
    there.stop();
    there.root.remove();
    app.panels = app.panels.filter((panel) => panel !== there);
    if (app.active === key) app.active = "main";
  } else if (there) {
    there.run(wanted);
  } else {
    const made = new Panel(key, wanted);
    app.panels.push(made);
    made.run();
  }
  layout();
}

function layout() {
  $("#panels").dataset.count = app.panels.length;
  fitPanels();
  emit("panels");
  emit("index");
}

function compare() {
  const other = $("#other").value;
  const main = app.panels[0].settings;
  sidePanel("compare", other ? { ...main, method: other, retrieval: $("#other-retrieval").value || null } : null);
}

function withoutRemoved() {
  const left = removedSettings();
  sidePanel("without", left ? { ...app.panels[0].settings, without: left } : null);
}

function run() {
  if (!form.reportValidity()) return;
  stopPlaying();
  remember();
  Object.assign(app, { index: 0, follow: true });
  const chosen = settings();
  if (app.panels.length) app.panels[0].run(chosen);
  else {
    app.panels.push(new Panel("main", chosen));
    app.panels[0].run();
  }
  if ($("#other").value) compare();
  if (app.removed.length) withoutRemoved();
  layout();
}

// ---- steps -------------------------------------------------------------------------------------------------------

const last = () => Math.max(0, (app.panels[0]?.steps.length ?? 1) - 1);

function show(index) {
  app.index = Math.min(Math.max(index, 0), last());
  app.follow = app.index === last() && app.panels[0].state === "running";
  $("#slider").value = app.index;
  $("#slider").setAttribute("aria-valuetext", `step ${app.index + 1} of ${app.panels[0].total}`);
  emit("index");
}

function stopPlaying() {
  clearInterval(playing);
  playing = null;
  $("#play").setAttribute("aria-pressed", "false");
  $("#play").textContent = "Play";
}

function play() {
  if (playing) return stopPlaying();
  if (!last()) return;
  if (app.index === last()) show(0);
  $("#play").setAttribute("aria-pressed", "true");
  $("#play").textContent = "Pause";
  playing = setInterval(() => (app.index < last() ? show(app.index + 1) : stopPlaying()), FRAME);
}

on("steps", (panel) => {
  if (panel.key !== "main") return;
  const slider = $("#slider");
  slider.max = panel.total - 1;
  slider.disabled = false;
  say(`Step ${panel.steps.length} of ${panel.total}`);
  if (app.follow) show(last());
});

on("state", (panel) => {
  const busy = app.panels.some((other) => ["waiting", "running"].includes(other.state));
  $("#cancel").disabled = !busy;
  panel.root.dataset.state = panel.state;
  if (!busy) say(panel.state === "finished" ? `Done: ${panel.total} steps.` : "");
  if (panel.key !== "main") return;
  document.body.dataset.state = panel.state;
  if (panel.state === "waiting") say("Asking the server …");
  if (panel.state === "cancelled") say("Cancelled.");
  if (panel.state === "failed") say("This cannot be run as asked; the message says why.");
});

on("removed", withoutRemoved);

on("back", (info) => {
  const other = info.instance !== app.info?.instance;
  if (!app.info || info.fingerprint !== app.info.fingerprint) return location.reload();
  app.info = info;
  say(other ? "The server is back; runs are made again." : "The server is back.");
  for (const panel of app.panels) if (panel.state === "lost" || other) panel.run();
});

// ---- clicks and keys ---------------------------------------------------------------------------------------------

function cancel() {
  for (const panel of app.panels) panel.cancel();
}

function escape() {
  if (cancelCheck()) return;
  if (!$("#cancel").disabled) cancel();
  else if (app.pixel) closePixel();
}

const KEYS = {
  ArrowLeft: () => show(app.index - 1),
  ArrowRight: () => show(app.index + 1),
  Home: () => show(0),
  End: () => show(last()),
  " ": play,
  Escape: escape,
  r: run,
  m: () => $("#map-button").disabled || toggleMap(),
  e: check,
  u: undo,
  "?": () => $("#help").showModal(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open || !app.panels.length) return;
  const typing = event.target.closest("input, select, textarea");
  const own = event.target.closest("button, a") && [" ", "Enter"].includes(event.key);
  if (own || (typing && event.key !== "Escape")) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

form.method_ = $("#method"); // form.method is the form's own
form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
for (const select of form.querySelectorAll("select, input")) {
  select.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.target.id.startsWith("other") || event.target.closest("#removal")) return;
    event.preventDefault();
    run();
  });
}
$("#method").addEventListener("change", chooseMethod);
$("#cancel").addEventListener("click", cancel);
$("#other").addEventListener("change", () => {
  retrievals($("#other-retrieval"), $("#other-retrieval-field"), $("#other").value);
  if (app.panels.length) compare();
});
$("#other-retrieval").addEventListener("change", compare);
$("#slider").addEventListener("input", (event) => {
  stopPlaying();
  show(Number(event.target.value));
});
$("#play").addEventListener("click", play);
$("#help-button").addEventListener("click", () => $("#help").showModal());
addEventListener("resize", fitPanels);

async function start() {
  try {
    fill(await ask("/api/bank"));
  } catch (error) {
    if (error.status) banner(`The bank cannot be shown: ${error.message}.`);
    return;
  }
  recall();
  run();
}

start();
