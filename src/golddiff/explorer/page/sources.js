// Where the mean comes from: the golden subset, the rows behind a pixel, the source map.
import { app, $, activePanel, element, emit, on, say } from "./state.js";
import { className, count, number, percent } from "./format.js";
import { place } from "./panel.js";

const PAUSE = 70; // milliseconds of rest before sources are asked for, while steps fly by
let timer = null;

const methodOf = (panel) => app.info.methods.find((method) => method.name === panel.settings.method);

export function thumb(source, pixel) {
  const name = className(app.info, source.label);
  const mark = element("span", { class: "mark", hidden: true });
  if (pixel) place(mark, pixel);
  return element("li", { class: "thumb", "data-row": source.row, "data-share": source.share },
    element("span", { class: "picture" },
      element("img", { src: `/api/rows/${source.row}.png?v=${app.info.fingerprint.slice(0, 12)}`, alt: `Training image ${source.row}${name && `, ${name}`}`, loading: "lazy" }),
      mark,
      element("button", { type: "button", class: "remove", "aria-label": `Remove image ${source.row}`, title: "Remove this image and see the same seed again", onclick: () => emit("remove", { kind: "row", value: source.row }) }, "×")),
    element("span", { class: "share" }, source.colour ? swatch(source.colour) : "", percent(source.share)),
    element("span", { class: "who muted", title: name }, ...named(source.row, name)));
}

// Number and class; a long class gets a line of its own.
function named(row, name) {
  return name.length > 2 ? [name, element("br"), `#${row}`] : [`#${row}${name && ` ${name}`}`];
}

function swatch(colour) {
  const made = element("i", { class: "swatch", "aria-hidden": "true" });
  made.style.background = colour;
  return made;
}

function why(panel) {
  const method = panel.settings.method;
  if (method === "wiener") return "Wiener has no rows: its mean is linear in x_t, from mean and covariance of the bank alone. So there is nothing to attribute.";
  return methodOf(panel)?.rows ? null : `${method} weighs patches, not whole training images, so no sources can be shown. Choose optimal, pca, golddiff or ls.`;
}

async function drawGolden() {
  const panel = activePanel();
  const step = panel?.shown;
  const list = $("#golden");
  const of = `${panel?.id} ${step?.index}`;
  list.classList.toggle("stale", list.dataset.of !== of); // what is there is of another picture
  if (!step) return;
  const silent = why(panel);
  if (silent) {
    list.replaceChildren();
    $("#every").hidden = true;
    $("#golden-note").textContent = silent;
    return drawMap(panel, null);
  }
  const every = `steps/${step.index}/sources?every=true`;
  const wanted = app.map || panel.kept.has(every) ? every : `steps/${step.index}/sources`;
  let found;
  try {
    if (app.map) say("Drawing the source map …");
    found = await panel.asked(wanted);
  } catch (error) {
    if (panel === activePanel() && panel.shown === step) $("#golden-note").textContent = `No sources: ${error.message}.`;
    return;
  }
  if (!found || panel !== activePanel() || panel.shown?.index !== step.index) return;
  if (app.map) say("");
  list.replaceChildren(...found.rows.map((source) => thumb(source)));
  list.classList.remove("stale");
  Object.assign(list.dataset, { step: step.index, of });
  const grid = found.pixels < found.of ? ` From ${count(found.pixels)} of ${count(found.of)} pixels.` : "";
  const taken = step.golden === step.eligible ? `all ${count(step.eligible)} images` : `${count(step.golden)} of ${count(step.eligible)} images taken for each pixel`;
  $("#golden-note").textContent = `The training images that carry this mean: these ${found.rows.length} hold ${percent(found.coverage)} of its weights; ${taken}.${grid}${app.map ? " Greys in the map: rows beyond these colours." : ""}`;
  $("#every").hidden = found.pixels === found.of;
  drawMap(panel, app.map ? found : null);
}

function drawMap(panel, found) {
  for (const other of app.panels) other.map.hidden = true;
  if (!found?.map) return;
  panel.map.src = `data:image/png;base64,${found.map}`;
  panel.map.alt = "Source map: the colour says which training image has most weight at each pixel";
  panel.map.hidden = false;
}

async function drawPixel() {
  const panel = activePanel();
  const step = panel?.shown;
  const card = $("#pixel");
  card.hidden = !app.pixel || !step;
  if (card.hidden) return;
  const { y, x } = app.pixel;
  $("#pixel-title").textContent = `Pixel ${x}, ${y}`;
  const silent = why(panel);
  if (silent) {
    $("#pixel-list").replaceChildren();
    $("#pixel-note").textContent = silent;
    return;
  }
  try {
    const found = await panel.asked(`steps/${step.index}/pixels/${y}/${x}`);
    if (app.pixel?.y !== y || app.pixel?.x !== x || panel.shown?.index !== step.index) return;
    const value = found.value.map((part) => number(part, 3)).join(", ");
    $("#pixel-note").textContent = `Value ${value}. Exact weights of ${count(found.total)} training images here; the ${found.rows.length} heaviest hold ${percent(found.coverage)}.`;
    $("#pixel-list").replaceChildren(...found.rows.slice(0, 12).map((source) => thumb(source, app.pixel)));
    Object.assign($("#pixel-list").dataset, { step: step.index, y, x });
  } catch (error) {
    $("#pixel-note").textContent = `No sources: ${error.message}.`;
  }
}

function drawWhich() {
  const field = $("#which");
  $("#which-field").hidden = app.panels.length < 2;
  if (!app.panels.some((panel) => panel.key === app.active)) app.active = "main";
  field.replaceChildren(...app.panels.map((panel) => new Option(panel.key === "without" ? `without: ${panel.title}` : panel.title, panel.key)));
  field.value = app.active;
}

function soon() {
  $("#map-button").disabled = Boolean(why(activePanel()));
  clearTimeout(timer);
  timer = setTimeout(() => {
    drawPixel();
    drawGolden();
  }, PAUSE);
}

// The shares and the map from all pixels, not from a grid of them.
async function askEvery() {
  const panel = activePanel();
  $("#every").disabled = true;
  say("Asking all pixels …");
  try {
    await panel.asked(`steps/${panel.shown.index}/sources?every=true`);
    say("");
  } catch (error) {
    say(`${error.message}.`);
  }
  $("#every").disabled = false;
  drawGolden();
}

export function toggleMap() {
  app.map = !app.map;
  $("#map-button").setAttribute("aria-pressed", app.map);
  drawGolden();
}

export function closePixel() {
  app.pixel = null;
  emit("pixel");
}

on("steps", (panel) => panel === activePanel() && panel.shown === panel.steps.at(-1) && soon());
on("index", soon);
on("pixel", () => {
  drawWhich();
  $("#map-button").disabled = Boolean(why(activePanel()));
  drawPixel();
  drawGolden();
});
on("panels", () => {
  drawWhich();
  soon();
});
$("#which").addEventListener("change", (event) => {
  app.active = event.target.value;
  emit("pixel");
});
$("#map-button").addEventListener("click", toggleMap);
$("#every").addEventListener("click", askEvery);
$("#pixel-close").addEventListener("click", closePixel);
