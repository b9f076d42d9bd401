"use strict";
// Keeps a served page up to date: fetches it anew and puts in only what changed, so that scroll position, filters, sorting, open
// parts and the keyboard's place stay. What comes is parsed without running any script in it.
const POLL_MILLISECONDS = 1500;
const source = new WeakMap();
const status = document.createElement("header");
status.className = "live"; status.setAttribute("role", "status");
document.body.prepend(status);
let tag = null;
function inner(node) { return node.matches("main, section, .grid"); }
function remember(node) {
  source.set(node, node.outerHTML);
  if (inner(node)) for (const child of node.children) remember(child);
}
function mergeChart(old, fresh) {
  for (const part of ["h3", "figcaption", "script"]) old.querySelector(part).textContent = fresh.querySelector(part).textContent;
  const plot = old.querySelector(".plot"), news = fresh.querySelector(".plot");
  plot.setAttribute("aria-label", news.getAttribute("aria-label"));
  plot.style.height = news.style.height;
  if (seen.has(plot)) draw(plot);
}
function places(node) { return Array.from(node.querySelectorAll("a, button, input, summary, [tabindex]")); }
function replace(old, fresh) {
  const focused = old.contains(document.activeElement) ? places(old).indexOf(document.activeElement) : -1;
  const header = old.querySelector("th[aria-sort]"), left = old.scrollLeft, top = old.scrollTop;
  if (old.matches("details")) fresh.open = old.open;
  old.replaceWith(fresh);
  watchPlots(fresh);
  if (header) sortRows(fresh.querySelectorAll("th")[header.cellIndex], header.getAttribute("aria-sort") === "descending");
  fresh.scrollLeft = left; fresh.scrollTop = top;
  if (focused >= 0) places(fresh)[focused]?.focus({ preventScroll: true });
}
function merge(old, fresh) {
  const text = fresh.outerHTML;
  if (source.get(old) === text) return;
  if (inner(old) && old.tagName === fresh.tagName && old.children.length === fresh.children.length) {
    source.set(old, text);
    const pairs = Array.from(old.children, (child, place) => [child, fresh.children[place]]);
    for (const [child, news] of pairs) merge(child, news);
  } else if (old.matches(".chart") && fresh.matches(".chart") && old.querySelector(".plot").dataset.figure === fresh.querySelector(".plot").dataset.figure) {
    source.set(old, text);
    mergeChart(old, fresh);
  } else if (!(old.matches(".tools") && fresh.matches(".tools"))) {
    remember(fresh);
    replace(old, fresh);
  }
}
// The page's own numbered parts; a drawn chart has more ids inside.
function shape(main) { return Array.from(main.querySelectorAll("h2, .plot, table[id]"), (node) => node.dataset.figure || node.id || node.textContent).join("|"); }
function update(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html"), main = document.querySelector("main");
  const news = document.adoptNode(fresh.querySelector("main"));
  document.title = fresh.title;
  // Numbers on the page shift where a chart or a table is new; then all of it is put in anew.
  if (shape(main) === shape(news)) merge(main, news);
  else {
    const kept = Array.from(main.querySelectorAll("input"), (input) => [input.type, input.id || input.ariaLabel, input.value, input.checked]);
    remember(news); main.replaceWith(news); watchPlots(news);
    for (const input of news.querySelectorAll("input")) {
      const place = kept.findIndex(([type, name]) => type === input.type && name === (input.id || input.ariaLabel));
      if (place >= 0) { const [old] = kept.splice(place, 1); input.value = old[2]; input.checked = old[3]; }
    }
  }
  for (const input of document.querySelectorAll("input[data-table]")) filterRows(input);
  for (const box of document.querySelectorAll("input[data-whole]")) showWhole(box);
}
async function poll() {
  try {
    const answer = await fetch(location.pathname, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.status === 200) { update(await answer.text()); tag = answer.headers.get("ETag"); }
    status.textContent = answer.status === 200 || answer.status === 304 ? "Live: this page follows the run." : `The server answered ${answer.status}.`;
  } catch { status.textContent = "The server has ended: this page stays as it is."; }
  setTimeout(poll, POLL_MILLISECONDS);
}
remember(document.querySelector("main"));
poll();
