"use strict";
// Shows the values of a chart under the pointer. A live page also requests the page from its server again, and changes
// only what differs, so that open lists, check boxes and scroll positions are kept. All text is set as text, never as
// HTML.

const tip = document.getElementById("tip");
let pointer = null;  // the last pointer event over a chart

const formats = {
  number: value => String(Number(value.toPrecision(5))),
  percent: value => `${(100 * value).toFixed(1)} %`,
  count: value => withUnit(value, [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]]),
  bytes: value => withUnit(value, [[" TB", 1e12], [" GB", 1e9], [" MB", 1e6], [" kB", 1e3]]),
};

function withUnit(value, units) {
  const found = units.find(([, size]) => value >= size);
  return found ? Number((value / found[1]).toPrecision(4)) + found[0] : String(Number(value.toPrecision(4)));
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}

function describe(values, tokens, end) {
  const format = formats[values.format];
  const unit = ["percent", "bytes"].includes(values.format) ? "" : ` ${values.unit}`;
  const step = values.batch ? `step ${Math.round(tokens / values.batch).toLocaleString("en")}, ` : "";
  const lines = [`${step}${formats.count(tokens)} tokens`];
  for (const series of values.series) {
    const at = nearest(series.x, tokens);
    const far = Math.abs(series.x[at] - tokens) > 0.01 * end ? ` at ${formats.count(series.x[at])} tokens` : "";
    const label = series.label + (series.kind === "smooth" ? ", running mean" : "");
    let line = `${label}: ${format(series.y[at])}${unit}${far}`;
    if (series.kind === "errors") line += ` ± ${format(series.high[at] - series.y[at])}`;
    else if (series.low && series.low[at] < series.high[at])
      line += `; range ${format(series.low[at])} to ${format(series.high[at])}`;
    lines.push(line);
  }
  return lines.join("\n");
}

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 16 : x + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
}

const removeCursor = () => document.querySelectorAll(".cursor").forEach(line => line.remove());

function hideTip() {
  pointer = null;
  tip.hidden = true;
  removeCursor();
}

function hover(event) {
  const drawing = event.target.closest?.("svg.drawing");
  if (!drawing) return hideTip();
  pointer = event;
  removeCursor();
  const mark = event.target.closest(".mark");
  if (mark) return showTip(mark.dataset.words, event.clientX, event.clientY);
  const [left, right, top, bottom, end] = ["left", "right", "top", "bottom", "end"].map(name => +drawing.dataset[name]);
  const box = drawing.getBoundingClientRect();
  const x = (event.clientX - box.left) * drawing.viewBox.baseVal.width / box.width;
  if (x < left || x > right) return hideTip();
  const values = JSON.parse(drawing.closest("figure").dataset.values);
  const grid = values.series.reduce((most, series) => series.x.length > most.length ? series.x : most, []);
  const tokens = grid[nearest(grid, (x - left) / (right - left) * end)];
  const place = left + (right - left) * tokens / end;
  const cursor = document.createElementNS(drawing.namespaceURI, "line");
  const position = { class: "cursor", x1: place, x2: place, y1: top, y2: bottom };
  for (const name in position) cursor.setAttribute(name, position[name]);
  drawing.append(cursor);
  showTip(describe(values, tokens, end), event.clientX, event.clientY);
}

document.addEventListener("pointermove", hover);
document.addEventListener("pointerdown", hover);
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("focusin", event => {
  const mark = event.target.closest(".mark");
  if (!mark || pointer) return;
  const { left, bottom } = mark.querySelector("circle").getBoundingClientRect();
  showTip(mark.dataset.words, left, bottom);
});
document.addEventListener("focusout", () => { if (!pointer) hideTip(); });

// Live pages

function morph(old, next) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  if (old.isEqualNode(next)) return;
  for (const { name, value } of next.attributes) {
    if (old.getAttribute(name) !== value && name !== "open") old.setAttribute(name, value);
  }
  for (const name of old.getAttributeNames()) {
    if (!next.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  const known = [...old.childNodes].filter(node => !node.classList?.contains("cursor"));
  for (const child of [...next.childNodes]) {
    const same = known.findIndex(node => node.nodeName === child.nodeName && (node.id ?? "") === (child.id ?? ""));
    const found = same < 0 ? null : known[same];
    known.splice(0, same + 1).slice(0, -1).forEach(node => node.remove());
    if (found) morph(found, child);
    else old.insertBefore(document.importNode(child, true), known[0] ?? null);
  }
  known.forEach(node => node.remove());
}

async function update() {
  const connection = document.getElementById("connection");
  const start = performance.now();
  let text = "";
  try {
    const response = await fetch(location.href, { cache: "no-store" });
    const next = new DOMParser().parseFromString(await response.text(), "text/html");
    document.title = next.title;
    next.getElementById("connection").replaceWith(connection.cloneNode(true));
    next.getElementById("tip").replaceWith(tip.cloneNode(true));
    const picker = document.getElementById("picker");
    if (picker.matches(":focus-within")) next.getElementById("picker").replaceWith(picker.cloneNode(true));
    morph(document.body, next.body);
    if (pointer?.target.isConnected) hover(pointer);
  } catch {
    text = "not updated: no answer from `tinyllama watch`";
  }
  connection.textContent = text || "live";
  connection.className = text ? "lost" : "";
  setTimeout(update, document.hidden ? 15000 : Math.max(1500, 10 * (performance.now() - start)));
}

function pick() {
  const chosen = new URLSearchParams(new FormData(document.getElementById("picker")));
  location.search = chosen;
}

if (document.body.classList.contains("live") && location.protocol.startsWith("http")) {
  document.getElementById("picker").addEventListener("change", pick);
  setTimeout(update, 1500);
} else {
  document.getElementById("picker")?.remove();
}
