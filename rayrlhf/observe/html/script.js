"use strict";
// Charts take their colors from the style sheet, so that they follow the reader's light or dark mode. They are drawn when they
// come into sight, so that a page with many of them answers at once.
const FEWEST_TO_SMOOTH = 12;
const seen = new Set();
function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function palette() { return ["--accent", "--second", "--third", "--fourth", "--fifth", "--sixth", "--seventh", "--eighth", "--ninth"].map(color); }
function themed(layout) {
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line") };
  const themed = Object.assign({}, layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), family: "system-ui, sans-serif", size: 13 },
    colorway: palette(),
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink") } },
    margin: { l: 50, r: 12, t: layout.showlegend ? 40 : 12, b: 44 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  });
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) themed[key] = Object.assign({}, axis, layout[key]);
  }
  themed.xaxis = Object.assign({}, axis, layout.xaxis); themed.yaxis = Object.assign({ automargin: true }, axis, layout.yaxis);
  themed.shapes = (layout.shapes || []).map((shape) => Object.assign({ line: { color: color("--bad"), width: 2, dash: "dash" } }, shape));
  return themed;
}
// The exponential mean with its start corrected, so that the first points are not pulled to 0.
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value; total = weight * total + (1 - weight);
    return mean / total;
  });
}
// A trace with `means` is a curve: its points faint, its smoothed means over them. One with `compare` is the other run's.
function drawn(data) {
  const slider = document.getElementById("smoothing"), box = document.getElementById("compare"), colors = palette();
  const wanted = slider ? Number(slider.value) : 0, traces = [];
  for (const trace of data) {
    if (trace.compare && box && !box.checked) continue;
    if (!trace.means) { traces.push(trace); continue; }
    const { means, compare, ...raw } = trace;
    const line = { color: colors[compare ? 1 : 0], width: 2, dash: compare ? "dash" : "solid" };
    const weight = raw.x.length < FEWEST_TO_SMOOTH ? 0 : wanted;
    if (weight > 0) traces.push(Object.assign({}, raw, { mode: "lines", line: { color: line.color, width: 1 }, opacity: 0.3, showlegend: false, hoverinfo: "skip" }));
    const lone = raw.x.length === 1 ? { mode: "markers", marker: { color: line.color, size: 7 } } : { mode: "lines" };
    traces.push(Object.assign({}, raw, lone, { line }, weight > 0 ? { x: means.x, y: smoothed(means.y, weight) } : {}));
  }
  return traces;
}
function draw(plot) {
  const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  seen.add(plot);
  Plotly.react(plot, drawn(figure.data), themed(figure.layout), { displaylogo: false, displayModeBar: false });
}
function redraw() { for (const plot of seen) if (plot.isConnected) draw(plot); else seen.delete(plot); }
function value(cell) { return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value); }
function sortRows(header, down) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = Array.from(body.rows, (row) => ({ row, key: value(row.cells[column]) })).sort((one, two) => {
    const order = one.key < two.key ? -1 : one.key > two.key ? 1 : 0;
    return down ? -order : order;
  });
  body.append(...rows.map((entry) => entry.row));
}
function filterRows(input) {
  const wanted = input.value.toLowerCase(), rows = document.getElementById(input.dataset.table).tBodies[0].rows;
  let shown = 0;
  for (const row of rows) { row.hidden = !row.textContent.toLowerCase().includes(wanted); shown += row.hidden ? 0 : 1; }
  const count = document.querySelector(`output[data-count="${input.dataset.table}"]`);
  if (count) count.textContent = wanted ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
}
function showWhole(box) { document.getElementById(box.dataset.whole).classList.toggle("clamped", !box.checked); }
const inSight = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && !seen.has(entry.target)) draw(entry.target);
}, { rootMargin: "200px" });
const resized = new ResizeObserver((entries) => { for (const { target } of entries) if (seen.has(target) && target.offsetWidth) Plotly.Plots.resize(target); });
function watchPlots(within) { for (const plot of within.querySelectorAll(".plot")) { inSight.observe(plot); resized.observe(plot); } }
// One listener a kind on the whole page: parts of a live page come and go.
document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sortRows(button.parentElement, button.parentElement.getAttribute("aria-sort") === "ascending");
});
document.addEventListener("input", (event) => {
  const input = event.target;
  if (input.dataset.table) filterRows(input);
  else if (input.dataset.whole) showWhole(input);
  else if (input.id === "smoothing" || input.id === "compare") redraw();
});
if (window.Plotly) {
  watchPlots(document);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { for (const plot of document.querySelectorAll(".plot")) draw(plot); });
}
