// The curve of effective support: steps across, images up, both with few marks.
import { app, $, on } from "./state.js";
import { count } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const LINES = { compare: "Dashed:", without: "Dotted: without the removed images," };
const LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 30, HEIGHT = 190;

function shape(tag, attributes, text) {
  const made = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text != null) made.textContent = text;
  return made;
}

function scales(width, steps, most) {
  const top = Math.max(1, Math.ceil(Math.log10(most)));
  const x = (index) => LEFT + (steps > 1 ? index / (steps - 1) : 0.5) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (Math.log10(Math.max(1, value)) / top) * (HEIGHT - TOP - BOTTOM);
  return { x, y, top };
}

function axes(svg, width, steps, { x, y, top }) {
  for (let power = 0; power <= top; power++) {
    svg.append(shape("line", { x1: LEFT, x2: width - RIGHT, y1: y(10 ** power), y2: y(10 ** power), class: "grid" }));
    svg.append(shape("text", { x: LEFT - 6, y: y(10 ** power) + 4, class: "tick end" }, count(10 ** power)));
  }
  const every = Math.ceil(steps / 10);
  for (let index = 0; index < steps; index += every) {
    svg.append(shape("text", { x: x(index), y: HEIGHT - BOTTOM + 14, class: "tick middle" }, index + 1));
  }
  svg.append(shape("text", { x: width - RIGHT, y: HEIGHT - 2, class: "tick end" }, "step, from noise to image"));
}

function curve(svg, panel, { x, y }) {
  const steps = panel.steps.filter((step) => step.ess);
  if (!steps.length) return false;
  const path = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)},${b.toFixed(1)}`).join("");
  const upper = steps.map((step) => [x(step.index), y(step.ess.high)]);
  const lower = steps.map((step) => [x(step.index), y(step.ess.low)]).reverse();
  if (panel.key === "main") svg.append(shape("path", { d: `${path([...upper, ...lower])}Z`, class: "band" }));
  const middle = steps.map((step) => [x(step.index), y(step.ess.median)]);
  svg.append(shape("path", { d: path(middle), class: `line ${panel.key}`, "data-panel": panel.key }));
  const now = steps.find((step) => step.index === Math.min(app.index, panel.steps.length - 1));
  for (const step of steps) {
    const dot = shape("circle", { cx: x(step.index), cy: y(step.ess.median), r: step === now ? 5 : 2.5, class: `dot ${panel.key}`, "data-ess": step.ess.median });
    dot.append(shape("title", {}, `${panel.title}, step ${step.index + 1}: ${step.ess.median.toPrecision(4)} images (median of the pixels)`));
    svg.append(dot);
  }
  return true;
}

export function drawSupport() {
  const box = $("#support-chart");
  const width = Math.max(240, box.clientWidth);
  const steps = Math.max(1, ...app.panels.map((panel) => panel.total));
  const scale = scales(width, steps, app.info?.rows ?? 10);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": described() });
  axes(svg, width, steps, scale);
  const main = app.panels[0];
  if (main?.steps.length) svg.append(shape("line", { x1: scale.x(app.index), x2: scale.x(app.index), y1: TOP, y2: HEIGHT - BOTTOM, class: "now" }));
  const silent = app.panels.filter((panel) => !curve(svg, panel, scale) && panel.steps.length);
  box.replaceChildren(svg);
  const drawn = app.panels.filter((panel) => LINES[panel.key] && panel.steps.length && !silent.includes(panel));
  const said = [...drawn.map((panel) => `${LINES[panel.key]} ${panel.title}.`), ...silent.map((panel) => `${panel.settings.method} says nothing of its support.`)];
  const note = $("#support-note");
  note.hidden = !said.length;
  note.textContent = said.join(" ");
}

function described() {
  const ess = app.panels[0]?.steps.filter((step) => step.ess).map((step) => `${step.index + 1}: ${step.ess.median.toPrecision(3)}`);
  return ess?.length ? `Effective support, median of the pixels, by step: ${ess.join(", ")}` : "No effective support yet";
}

on("steps", drawSupport);
on("index", drawSupport);
addEventListener("resize", drawSupport);
