"use strict";
// The board: one state, one render. Names come from records: they only ever become text nodes and attributes.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const FILTERS = ["dataset", "eps_class", "protocol", "family", "source"];
const SOURCES = ["measured", "reported", "quoted", "robustbench"];
const ROBUST = data.attacks.map(([name]) => name).filter((name) => name !== "clean");
const titles = new Map(data.attacks);

function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const named = (row) => row.defense + (row.variant ? ` (${row.variant})` : "") + (row.selection === "best" ? ", best epoch" : "");
const unknown = (row) => (row.source === "measured" ? "" : "unknown");

function accuracy(row, attack) {
  if (!["done", "bound"].includes(row.status)) return attack === "clean" ? element("span", { class: "failed" }, row.status) : "–";
  if (row.printed) return row.printed[attack] || "–";
  if (row[attack] === undefined) return "–";
  const bounds = element("small", {}, ` [${row[attack + "_low"].toFixed(1)}, ${row[attack + "_high"].toFixed(1)}]`);
  const spread = row.seeds > 1 ? ` ± ${row[attack + "_spread"].toFixed(1)}` : "";
  const most = row.status === "bound" && ["autoattack", "worst"].includes(attack) ? "≤ " : "";
  return element("span", {}, most + row[attack].toFixed(1) + spread, bounds);
}

const duration = (s) => (s < 600 ? `${s.toFixed(0)} s` : s < 36000 ? `${(s / 60).toFixed(0)} min` : `${(s / 3600).toFixed(0)} h`);
const plain = (name) => ({ value: (row) => row[name], show: (row) => (row[name] === undefined ? unknown(row) : String(row[name])) });
const figure = (name, form) => ({ number: true, value: (row) => row[name], show: (row) => (row[name] === undefined ? unknown(row) : form(row[name])) });
const points = (v) => (v > 0 ? "+" : "") + v.toFixed(1);

const COLUMNS = [
  { id: "rank", title: "#", number: true, on: true, value: (row) => row.rank, show: (row) => (row.rank === undefined ? "–" : String(row.rank)) },
  { id: "defense", title: "Defense", on: true, value: named, show: null },
  { id: "arch", title: "Network", on: true, ...plain("arch") },
  { id: "source", title: "Source", on: true, value: (row) => row.source, show: (row) => element("span", { class: `source ${row.source}` }, row.source) },
  { id: "dataset", title: "Dataset", ...plain("dataset") },
  { id: "eps_class", title: "eps", ...plain("eps_class") },
  { id: "protocol", title: "Protocol", ...plain("protocol") },
  { id: "eps_train", title: "eps train", on: true, value: (row) => row.eps_train, show: (row) => (row.eps_train || unknown(row)) + (row.eps === row.eps_class ? "" : ` (tested at ${row.eps})`) },
  { id: "epochs", title: "Epochs", on: true, number: true, value: (row) => row.epochs, show: (row) => (row.epochs === undefined ? unknown(row) : row.epochs + (row.selection && row.selection !== "last" ? ` (${row.selection})` : "")) },
  ...data.attacks.map(([name, title]) => ({ id: name, title: title[0].toUpperCase() + title.slice(1), on: true, number: true, value: (row) => row[name], show: (row) => accuracy(row, name) })),
  { id: "n", title: "n", ...figure("n", String) },
  { id: "seeds", title: "Seeds", on: true, number: true, value: (row) => row.seeds, show: (row) => (row.failed ? (row.seeds ? `${row.seeds} (+${row.failed} failed)` : `${row.failed} failed`) : row.seeds === undefined ? unknown(row) : String(row.seeds)) },
  { id: "best_known", title: "Best known", ...figure("best_known", (v) => v.toFixed(1)) },
  { id: "pgd_gap", title: "PGD-20 − AA", ...figure("pgd_gap", points) },
  { id: "masking", title: "Masking", ...plain("masking") },
  { id: "best_minus_last", title: "Best − last", ...figure("best_minus_last", points) },
  { id: "backwards_per_example", title: "Gradients / example", ...figure("backwards_per_example", (v) => v.toFixed(1)) },
  { id: "train_seconds", title: "Training time", ...figure("train_seconds", duration) },
  { id: "crafted_in", title: "Crafted in", on: data.rows.some((row) => row.crafted_in === "bf16"), ...plain("crafted_in") },
  { id: "train_device", title: "Trained on", ...plain("train_device") },
  { id: "reference", title: "Reference", long: true, ...plain("reference") },
  { id: "ids", title: "Records", long: true, ...plain("ids") },
];

// What is the same in all rows is said once, above the table, unless its column was asked for.
const TABLE = ["dataset", "eps_class", "protocol"];
const SAID_ONCE = ["arch", "source", "eps_train", "epochs", "seeds", "crafted_in"];
const state = { sort: null, down: true, columns: new Set(COLUMNS.filter((c) => c.on).map((c) => c.id)), asked: new Set(), robust: null };

function matching() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return data.rows.filter((row) => {
    if (FILTERS.some((name) => $(name).value && row[name] !== $(name).value)) return false;
    const text = [named(row), row.arch, row.family, row.protocol, row.source, row.reference, row.notes, row.ids, row.train_device].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

function sorted(rows) {
  const column = COLUMNS.find((c) => c.id === state.sort);
  if (!column) return rows;
  const sign = state.down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [left, right] = [column.value(a), column.value(b)];
    if (left === undefined || right === undefined) return (left === undefined) - (right === undefined); // unknown last
    return sign * (typeof left === "number" && typeof right === "number" ? left - right : String(left).localeCompare(String(right), "en", { numeric: true }));
  });
}

function shown(rows) {
  const one = new Set(rows.map((row) => row.table)).size < 2;
  return COLUMNS.filter((column) => {
    if (column.id === "rank" && (!one || rows.every((row) => row.rank === undefined))) return false; // ranks of two tables do not compare
    // What tells two tables apart stands beside their rows.
    if (TABLE.includes(column.id)) return state.columns.has(column.id) || new Set(rows.map((row) => row[column.id])).size > 1;
    if (same(column, rows) && !state.asked.has(column.id)) return false;
    if (titles.has(column.id) && column.id !== "clean" && rows.every((row) => row[column.id] === undefined)) return false;
    return column.id === "defense" || state.columns.has(column.id);
  });
}

function same(column, rows) {
  return SAID_ONCE.includes(column.id) && rows.length > 1 && new Set(rows.map((row) => text(column.show(row)))).size === 1;
}

const text = (shown) => (typeof shown === "string" ? shown : shown.textContent);

function caption(rows, tables) {
  const once = COLUMNS.filter((column) => state.columns.has(column.id) && same(column, rows) && !state.asked.has(column.id));
  const title = tables.length === 1 ? tables[0] : "Several tables side by side";
  const said = once.map((column) => `${column.title.toLowerCase()} ${text(column.show(rows[0]))}`).join(", ");
  return [title, element("small", {}, said ? ` all rows: ${said}` : "")];
}

function render() {
  const rows = sorted(matching());
  const tables = [...new Set(rows.map((row) => row.table))];
  drawTable(rows, shown(rows), tables);
  drawPlot(rows);
  const several = tables.length > 1 ? ` Rows of ${tables.length} tables: not ranked together.` : "";
  $("status").textContent = `${rows.length} of ${data.rows.length} rows.${several}`;
}

function drawTable(rows, columns, tables) {
  const table = $("board");
  table.caption.replaceChildren(...caption(rows, tables));
  table.tHead.replaceChildren(element("tr", {}, ...columns.map((column) => {
    const direction = state.sort !== column.id ? "none" : state.down ? "descending" : "ascending";
    const sort = () => {
      state.down = state.sort === column.id ? !state.down : Boolean(column.number) && column.id !== "rank";
      state.sort = column.id;
      render();
      table.tHead.querySelector(`[data-column="${CSS.escape(column.id)}"]`).focus();
    };
    const button = element("button", { type: "button", "data-column": column.id, title: data.columns[column.id], onclick: sort }, column.title);
    return element("th", { scope: "col", "aria-sort": direction, class: column.number ? "number" : null }, button);
  })));
  table.tBodies[0].replaceChildren(...rows.map((row) => element("tr", {}, ...columns.map((column) => {
    if (column.id !== "defense") return element("td", { class: column.number ? "number" : column.long ? "long" : null }, column.show(row));
    const mark = row.notes ? element("span", { class: "mark", title: row.notes }, " ⚠", element("span", { class: "skip" }, "has notes")) : null;
    return element("th", { scope: "row" }, element("button", { type: "button", onclick: () => detail(row) }, named(row)), mark);
  }))));
}

// ---------------------------------------------------------------------------------------------- scatter

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

function span(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = Math.max(1, (high - low) * 0.06);
  return [Math.max(0, Math.floor(low - margin)), Math.min(100, Math.ceil(high + margin))];
}

function ticks(low, high) {
  const step = [1, 2, 5, 10, 20].find((size) => (high - low) / size <= 8) || 25;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
}

function shape(source, x, y, attributes) {
  const at = { class: `point ${source} ${source === "measured" ? "" : "hollow"}`, ...attributes };
  if (source === "measured") return element("svg:circle", { cx: x, cy: y, r: 5, ...at });
  if (source === "reported") return element("svg:rect", { x: x - 4.5, y: y - 4.5, width: 9, height: 9, ...at });
  const corners = source === "quoted" ? [[0, -6], [6, 0], [0, 6], [-6, 0]] : [[0, -6], [5.5, 4.5], [-5.5, 4.5]];
  return element("svg:polygon", { points: corners.map(([a, b]) => `${x + a},${y + b}`).join(" "), ...at });
}

const both = (rows, attack) => rows.filter((row) => row.clean !== undefined && row[attack] !== undefined);

function drawPlot(rows) {
  // Unless one was chosen, the measure that most rows have; of several, the strictest.
  const y0 = state.robust || ROBUST.reduce((best, name) => (both(rows, name).length >= both(rows, best).length ? name : best), ROBUST[0]);
  $("robust").value = y0;
  const seen = both(rows, y0);
  $("legend").replaceChildren(...SOURCES.filter((source) => seen.some((row) => row.source === source)).map((source) =>
    element("span", {}, element("svg:svg", { width: 16, height: 16, "aria-hidden": "true" }, shape(source, 8, 8, {})), source)));
  if (!seen.length) {
    $("plot").replaceChildren(element("p", {}, `No row here has both a natural accuracy and one under ${titles.get(y0)}.`));
    return;
  }
  const width = Math.max(300, $("plot").clientWidth);
  const height = Math.min(430, Math.max(280, width * 0.6));
  const [xs, ys] = [span(seen.map((row) => row.clean)), span(seen.flatMap((row) => [row[y0], row[`${y0}_low`] ?? row[y0], row[`${y0}_high`] ?? row[y0]]))];
  const [x, y] = [scale(...xs, 50, width - 20), scale(...ys, height - 40, 28)];
  const label = `Scatter of ${seen.length} rows: natural accuracy ${xs[0]} to ${xs[1]} percent, accuracy under ${titles.get(y0)} ${ys[0]} to ${ys[1]} percent.`;
  const svg = element("svg:svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  svg.append(element("svg:defs", {}, element("svg:marker", { id: "head", viewBox: "0 0 8 8", refX: 8, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
    element("svg:path", { d: "M0 0 L8 4 L0 8", class: "arrow" }))));
  for (const at of ticks(...xs)) svg.append(element("svg:line", { class: "grid", x1: x(at), x2: x(at), y1: 28, y2: height - 40 }), element("svg:text", { x: x(at), y: height - 24, "text-anchor": "middle" }, String(at)));
  for (const at of ticks(...ys)) svg.append(element("svg:line", { class: "grid", x1: 50, x2: width - 20, y1: y(at), y2: y(at) }), element("svg:text", { x: 44, y: y(at) + 4, "text-anchor": "end" }, String(at)));
  svg.append(element("svg:text", { x: width - 20, y: height - 6, "text-anchor": "end", class: "name" }, "natural accuracy, %"));
  svg.append(element("svg:text", { x: 10, y: 14, class: "name" }, `accuracy under ${titles.get(y0)}, %`));
  const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));
  for (const row of seen) {
    if (row.clean_low !== undefined) svg.append(element("svg:line", { class: `bar ${row.source}`, x1: x(clamp(row.clean_low, xs)), x2: x(clamp(row.clean_high, xs)), y1: y(row[y0]), y2: y(row[y0]) }));
    if (row[`${y0}_low`] !== undefined) svg.append(element("svg:line", { class: `bar ${row.source}`, x1: x(row.clean), x2: x(row.clean), y1: y(row[`${y0}_low`]), y2: y(row[`${y0}_high`]) }));
  }
  const visible = new Set(seen);
  for (const [base, friend] of data.arrows) {
    const [a, b] = [data.rows[base], data.rows[friend]];
    if (!visible.has(a) || !visible.has(b)) continue;
    const [dx, dy] = [x(b.clean) - x(a.clean), y(b[y0]) - y(a[y0])];
    const long = Math.hypot(dx, dy);
    if (long > 16) svg.append(element("svg:line", { class: "arrow", "marker-end": "url(#head)", x1: x(a.clean) + (7 * dx) / long, y1: y(a[y0]) + (7 * dy) / long, x2: x(b.clean) - (7 * dx) / long, y2: y(b[y0]) - (7 * dy) / long }));
  }
  for (const row of seen) {
    const point = shape(row.source, x(row.clean), y(row[y0]), { onclick: () => detail(row) });
    point.append(element("svg:title", {}, `${named(row)}, ${row.arch}, ${row.source}: natural ${row.clean.toFixed(1)}, ${titles.get(y0)} ${row[y0].toFixed(1)}`));
    svg.append(point);
  }
  if (seen.length <= (width < 700 ? 8 : 24)) nameThem(svg, seen, x, y, y0, width);
  $("plot").replaceChildren(svg);
}

function nameThem(svg, seen, x, y, y0, width) {
  // Names where they do not cover one another; the table has them all.
  const taken = [];
  for (const row of seen) {
    const alike = seen.filter((other) => named(other) === named(row)).length > 1;
    const text = named(row) + (alike && row.epochs !== undefined ? `, ${row.epochs} epochs` : "");
    const [w, left] = [7 * text.length, x(row.clean) + 9];
    for (const [at, anchor, top] of [[left, "start", y(row[y0]) - 7], [left, "start", y(row[y0]) + 15], [left - 18, "end", y(row[y0]) - 7], [left - 18, "end", y(row[y0]) + 15]]) {
      const box = anchor === "start" ? [at, top - 11, at + w, top + 3] : [at - w, top - 11, at, top + 3];
      if (box[0] < 50 || box[2] > width || taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
      taken.push(box);
      svg.append(element("svg:text", { x: at, y: top, "text-anchor": anchor, class: "name" }, text));
      break;
    }
  }
}

// ---------------------------------------------------------------------------------------------- details

function list(pairs) {
  return element("dl", {}, ...pairs.filter(([, value]) => value !== undefined && value !== null && value !== "").flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
}

function detail(row) {
  const parts = [list([["source", row.source], ["table", row.table], ["network", row.arch], ["eps of the attacks", row.eps], ["eps of training", row.eps_train], ["epochs", row.epochs], ["selection", row.selection], ["test examples", row.n], ["seeds", row.seeds], ["status", row.status], ["reference", row.reference], ["masked gradients", row.masking], ["attacks crafted in", row.crafted_in], ["training", row.train_seconds === undefined ? "" : `${duration(row.train_seconds)} on ${row.train_device || "an unknown device"}`]])];
  const attacks = data.attacks.filter(([name]) => row[name] !== undefined);
  if (attacks.length) parts.push(element("h3", {}, "Accuracy, %"), list(attacks.map(([name, title]) => [title, accuracy(row, name).textContent ?? accuracy(row, name)])));
  if (row.notes) parts.push(element("h3", {}, "Notes and warnings"), element("p", { class: "mark" }, row.notes));
  const ids = (row.ids || "").split(" ").filter((id) => id in data.records);
  const curved = ids.filter((id) => data.records[id].curves);
  if (curved.length) parts.push(element("h3", {}, "Training"), curves(curved));
  for (const id of ids) parts.push(...record(id));
  const protocol = data.protocols[row.protocol];
  if (protocol && row.source === "measured") parts.push(element("h3", {}, `Protocol ${row.protocol}`), element("p", {}, protocol.source), element("pre", {}, Object.entries(protocol.attacks).map(([name, settings]) => `${name}: ${JSON.stringify(settings)}`).join("\n")));
  $("detail-title").textContent = named(row);
  $("detail-body").replaceChildren(...parts);
  $("detail").showModal();
  $("detail").scrollTop = 0;
}

function record(id) {
  const said = data.records[id];
  const right = data.attacks.filter(([name]) => name in said.correct).map(([name, title]) => `${title} ${said.correct[name]}/${said.n}`).join(", ");
  const stages = Object.entries(said.stages).map(([name, broke]) => `${name}: ${Object.entries(broke).map(([stage, k]) => `${stage} ${k}`).join(", ")}`).join("; ");
  const opened = element("details", {}, element("summary", {}, "Settings"), element("pre", {}, JSON.stringify({ ...said.settings, fields: said.fields }, null, 1)));
  return [element("h3", {}, `Record ${id}`), list([["seed", said.seed], ["status", said.status === "done" ? "" : said.status], ["still right", right], ["broken first by", stages], ["checks for masking", Object.entries(said.checks).map(([name, seen]) => `${name}: ${seen}`).join("; ")], ["warnings", said.warnings.join("; ")], ["weights", said.fingerprint], ["data", `${said.data.name}, ${said.data.rule} of ${said.data.of}, ${said.data.fingerprint}`], ["hash", said.hash], ["examined on", Object.values(said.run).join(", ")]]), opened];
}

const CURVES = [["val_natural", "Natural accuracy (validation), %", 100], ["val_pgd-10", "PGD-10 accuracy (validation), %", 100], ["steps_per_example", "Attack steps an example", 1], ["loss", "Loss", 1]];

function curves(ids) {
  return element("div", { class: "curves" }, ...CURVES.map(([name, title, factor]) => {
    const lines = ids.map((id) => (data.records[id].curves[name] || []).map(([epoch, value]) => [epoch, value * factor])).filter((line) => line.length);
    if (!lines.length) return null;
    const all = lines.flat();
    const [low, high] = [Math.min(0, ...all.map((p) => p[1])), Math.max(...all.map((p) => p[1])) || 1];
    const last = Math.max(...all.map((p) => p[0]));
    const [x, y] = [scale(1, Math.max(2, last), 40, 290), scale(low, high, 150, 34)];
    const svg = element("svg:svg", { viewBox: "0 0 300 175", role: "img", "aria-label": `${title} over ${last} epochs, from ${all[0][1].toFixed(1)} to ${all.at(-1)[1].toFixed(1)}` });
    svg.append(element("svg:text", { x: 8, y: 16, class: "name" }, title));
    for (const at of [low, (low + high) / 2, high]) svg.append(element("svg:line", { class: "grid", x1: 40, x2: 290, y1: y(at), y2: y(at) }), element("svg:text", { x: 36, y: y(at) + 4, "text-anchor": "end" }, at.toFixed(high < 10 ? 1 : 0)));
    svg.append(element("svg:text", { x: 290, y: 168, "text-anchor": "end" }, `epoch ${last}`));
    for (const line of lines) svg.append(element("svg:polyline", { class: "measured", style: "fill:none;stroke-width:1.6", points: line.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }));
    return svg;
  }));
}

// ---------------------------------------------------------------------------------------------- beginning

function begin() {
  for (const name of FILTERS) {
    const values = [...new Set(data.rows.map((row) => row[name]))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    $(name).append(element("option", { value: "" }, "all"), ...values.map((value) => element("option", { value }, value)));
    $(name).addEventListener("change", render);
  }
  $("robust").append(...ROBUST.map((name) => element("option", { value: name }, titles.get(name))));
  $("robust").addEventListener("change", () => { state.robust = $("robust").value; render(); });
  $("search").addEventListener("input", render);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(() => { state.sort = state.robust = null; render(); }));
  for (const column of COLUMNS.filter((c) => c.id !== "defense")) {
    const box = element("input", { type: "checkbox", value: column.id, onchange: () => { state.asked.add(column.id); state.columns[box.checked ? "add" : "delete"](column.id); render(); } });
    box.checked = state.columns.has(column.id);
    $("choice").append(element("label", { title: data.columns[column.id] }, box, ` ${column.title}`));
  }
  $("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("resize", () => drawPlot(matching()));
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  $("notes").append(...data.notes.map((note) => element("li", {}, note.replaceAll("`", ""))));
  // The page opens on one table: the first that was measured, or else the first there is.
  const first = data.rows.find((row) => row.rank !== undefined) || data.rows[0];
  if (first) for (const name of ["dataset", "eps_class"]) $(name).value = first[name];
  render();
}

begin();
