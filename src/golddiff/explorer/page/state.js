// What the parts of the page share: the state, and who wants to know of changes.
export const app = {
  info: null,
  panels: [], // the first is the run of the settings, the others stand beside it
  index: 0, // the step that is shown
  follow: true, // go on to each new step
  active: "main", // whose sources are listed
  pixel: null, // {y, x}
  map: false,
  removed: [], // {kind: "row" | "label", value}
};

const listeners = new Map();

export function on(name, listener) {
  listeners.set(name, [...(listeners.get(name) ?? []), listener]);
}

export function emit(name, value) {
  for (const listener of listeners.get(name) ?? []) listener(value);
}

export const $ = (selector, root = document) => root.querySelector(selector);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const panelNamed = (key) => app.panels.find((panel) => panel.key === key);
export const activePanel = () => panelNamed(app.active) ?? app.panels[0];

export function say(text) {
  $("#status").textContent = text;
}
