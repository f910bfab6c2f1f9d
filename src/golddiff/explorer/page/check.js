// The golden subset against the exact scan, step by step, when asked for.
import { app, $, element, on } from "./state.js";
import { lines } from "./api.js";
import { number, seconds } from "./format.js";

let controller = null;

const possible = (panel) => Boolean(app.info.methods.find((method) => method.name === panel.settings.method)?.retrieval);

function reset() {
  controller?.abort();
  controller = null;
  const panel = app.panels[0];
  const can = possible(panel);
  $("#check").disabled = !can || panel.state !== "finished";
  $("#check-progress").hidden = $("#check-cancel").hidden = true;
  $("#check-status").textContent = can ? "" : `${panel.settings.method} takes no golden subset, so there is nothing to check.`;
}

function clear() {
  $("#check-table").hidden = true;
  $("tbody", $("#check-table")).replaceChildren();
}

function row(found) {
  const cells = [number(found.rms), seconds(found.seconds), seconds(found.seconds_full)];
  return element("tr", { "data-step": found.index, "data-rms": found.rms },
    element("th", { scope: "row" }, String(found.index + 1)), ...cells.map((text) => element("td", {}, text)));
}

function mark() {
  for (const line of document.querySelectorAll("#check-table tbody tr")) line.classList.toggle("now", Number(line.dataset.step) === app.index);
}

function summary(all) {
  const total = (key) => all.reduce((sum, found) => sum + found[key], 0);
  const worst = Math.max(...all.map((found) => found.rms));
  return `Largest error ${number(worst)} of a range of 2. Together ${seconds(total("seconds"))}, all rows ${seconds(total("seconds_full"))}.`;
}

export async function check() {
  const panel = app.panels[0];
  if ($("#check").disabled || controller) return;
  const mine = (controller = new AbortController());
  const all = [];
  clear();
  $("#check").disabled = true;
  $("#check-progress").hidden = $("#check-cancel").hidden = false;
  $("#check-progress").value = 0;
  $("#check-status").textContent = "Scanning all rows at each step …";
  let said = "";
  try {
    await lines(`/api/runs/${panel.id}/exact`, (event) => {
      if (event.kind === "compared") {
        all.push(event);
        $("#check-table").hidden = false;
        $("tbody", $("#check-table")).append(row(event));
        $("#check-progress").value = all.length / event.count;
        mark();
      } else if (event.kind === "end") said = event.state === "finished" ? summary(all) : event.message || "Cancelled.";
    }, mine.signal);
  } catch (error) {
    if (error.status === 404 || error.status === 410) {
      controller = null;
      $("#check-status").textContent = "The server has forgotten this run; running it again.";
      await panel.run();
      return panel.state === "finished" ? check() : undefined;
    }
    said = error.name === "AbortError" ? "Cancelled." : `${error.message}.`;
  }
  if (controller !== mine && controller) return;
  controller = null;
  $("#check").disabled = !possible(panel) || panel.state !== "finished";
  $("#check-progress").hidden = $("#check-cancel").hidden = true;
  $("#check-status").textContent = said;
}

export function cancelCheck() {
  const busy = Boolean(controller);
  controller?.abort();
  return busy;
}

on("index", mark);
on("state", (panel) => {
  if (panel.key !== "main") return;
  reset();
  if (panel.state === "waiting") clear();
});
$("#check").addEventListener("click", check);
$("#check-cancel").addEventListener("click", cancelCheck);
