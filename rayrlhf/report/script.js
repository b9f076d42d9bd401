"use strict";
// Charts take their colours from the style sheet, so that they follow the reader's light or dark mode.
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function themed(layout) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const themed = Object.assign({}, layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
    colorway: ["--accent", "--second", "--third", "--fourth"].map(colour),
    margin: { l: 50, r: 12, t: layout.showlegend ? 40 : 12, b: 44 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  });
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) themed[key] = Object.assign({}, axis, layout[key]);
  }
  themed.xaxis = Object.assign({}, axis, layout.xaxis); themed.yaxis = Object.assign({}, axis, layout.yaxis);
  themed.shapes = (layout.shapes || []).map((shape) => Object.assign({ line: { color: colour("--bad"), width: 2, dash: "dash" } }, shape));
  return themed;
}
function drawCharts() {
  for (const plot of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    Plotly.react(plot, figure.data, themed(figure.layout), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}
function value(cell) { return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value); }
function sortBy(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = Array.from(body.rows).sort((one, two) => {
    const a = value(one.cells[column]), b = value(two.cells[column]);
    const order = a < b ? -1 : a > b ? 1 : 0;
    return down ? -order : order;
  });
  body.append(...rows);
}
function filterRows(input) {
  const wanted = input.value.toLowerCase();
  for (const row of document.getElementById(input.dataset.table).tBodies[0].rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
  }
}
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sortBy(button.parentElement));
for (const input of document.querySelectorAll("input[data-table]")) input.addEventListener("input", () => filterRows(input));
if (document.querySelector(".plot")) {
  drawCharts();
  const resized = new ResizeObserver((entries) => { for (const entry of entries) Plotly.Plots.resize(entry.target); });
  for (const plot of document.querySelectorAll(".plot")) resized.observe(plot);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
}
