// Images that are taken out of the bank, and the same seed without them.
import { app, $, element, emit, on, say } from "./state.js";
import { className, count } from "./format.js";

export function removedSettings() {
  if (!app.removed.length) return null;
  const of = (kind) => app.removed.filter((item) => item.kind === kind).map((item) => item.value);
  return { rows: of("row"), labels: of("label"), statistics: $("#statistics").value };
}

function nameOf(item) {
  return item.kind === "row" ? `#${item.value}` : `class ${className(app.info, item.value)}`;
}

function changed(text) {
  $("#removed").replaceChildren(...app.removed.map((item) => element("li", { class: "chip" },
    item.kind === "row" ? element("img", { src: `/api/rows/${item.value}.png?v=${app.info.fingerprint.slice(0, 12)}`, alt: "" }) : "",
    nameOf(item),
    element("button", { type: "button", class: "remove", "aria-label": `Put ${nameOf(item)} back`, onclick: () => restore(item) }, "×"))));
  $("#removed-actions").hidden = !app.removed.length;
  say(text);
  emit("removed");
}

function remove(item) {
  if (app.removed.some((other) => other.kind === item.kind && other.value === item.value)) return say(`${nameOf(item)} is removed already.`);
  if (app.removed.length >= app.info.limits.removed) return say(`At most ${count(app.info.limits.removed)} can be removed.`);
  app.removed.push(item);
  changed(`Removed ${nameOf(item)}. Running the same seed without it.`);
}

function restore(item) {
  app.removed = app.removed.filter((other) => other !== item);
  changed(`Put ${nameOf(item)} back.`);
}

export function undo() {
  const last = app.removed.at(-1);
  if (last) restore(last);
}

on("remove", remove);
$("#undo").addEventListener("click", undo);
$("#restore").addEventListener("click", () => {
  app.removed = [];
  changed("All images are back.");
});
$("#drop").addEventListener("click", () => remove({ kind: "label", value: Number($("#drop-class").value) }));
$("#statistics").addEventListener("change", () => app.removed.length && changed("Running again without the removed images."));
