// Pages of long computations: groups of duplicates, clusters, the map.
import { choice, dropdown, fileName, h, notice, number, plural } from "./dom.js";
import { events, getFloats, getRows, getShorts, loadItems, store, thumbnail } from "./api.js";
import { JobPage, addAll, list } from "./pages.js";
import { createMap, groupColor } from "./map.js";
import { REMOVE, selections } from "./selections.js";

const GROUPS = 40; // shown at a time
const LEGEND = 24; // names of groups below the map

function openList(title, rows) {
  Object.assign(list, { title, rows });
  location.hash = "#/list";
}

const tile = (row) => {
  const image = h("img", { src: thumbnail(row), alt: "", loading: "lazy" }), name = h("span", { class: "name" });
  loadItems([row]).then(() => {
    const item = store.items.get(row);
    name.textContent = fileName(item.name);
    image.alt = name.title = item.name;
  }, () => {});
  return [h("a", { href: `#/image/${row}` }, image), name];
};

// A list of groups, of which more are shown on demand.
function inParts(groups, draw) {
  const host = h("div", {}), more = h("button", { click: () => add() });
  let shown = 0;
  const add = () => {
    host.append(...groups.slice(shown, shown + GROUPS).map(draw));
    shown = Math.min(groups.length, shown + GROUPS);
    more.textContent = `Show ${Math.min(GROUPS, groups.length - shown)} of ${number(groups.length - shown)} more`;
    more.hidden = shown === groups.length;
  };
  add();
  return [host, more];
}

export class DuplicatesPage extends JobPage {
  constructor() {
    const keep = dropdown("Keep", [["largest", "the largest"], ["sharpest", "the sharpest"], ["first", "the first by name"]], "largest", (value) => { this.keep = value; });
    super("duplicates", "Duplicates", "Copies and edited copies. Marked images are listed in the selection Remove; no file is deleted.", "Find duplicates", keep);
    this.keep ??= "largest";
    this.abort = new AbortController();
    events.addEventListener("selections", () => this.refresh(), { signal: this.abort.signal });
  }

  settings() { return { keep: this.keep }; }
  destroy() { super.destroy(); this.abort.abort(); }

  show({ groups, description }) {
    this.groups = groups;
    this.marks = [];
    const spare = groups.flatMap(({ rows, keep }) => rows.filter((row) => row !== keep));
    const marked = () => selections.lists.get(REMOVE) ?? new Set();
    const all = h("button", { click: () => selections.toggle(spare, true, REMOVE) }, `Mark all ${number(spare.length)} suggestions`);
    const none = h("button", { click: () => selections.toggle(spare.filter((row) => marked().has(row)), false, REMOVE) }, "Keep all");
    this.result.replaceChildren(h("div", { class: "row" },
      h("p", { class: "count" }, groups.length ? description : `No duplicates. ${description}`),
      ...(groups.length ? [all, none] : [])), ...inParts(groups, (group, i) => this.draw(group, i)));
    this.refresh();
  }

  draw({ tier, similarity, rows, keep }) {
    return h("section", { class: "group card" }, h("h2", {}, tier, h("span", { class: "number" },
      `${plural(rows.length, "image")}, lowest similarity ${similarity.toFixed(3)}`)),
      h("ul", { class: "strip" }, rows.map((row) => {
        const node = h("li", { class: "tile" }, tile(row), h("span", { class: "badge" }, row === keep ? "suggested to keep" : ""));
        const mark = choice("Keep or remove", [[false, "Keep"], [true, "Remove"]], false, (on) => selections.toggle([row], on, REMOVE));
        node.append(mark);
        this.marks.push([row, node, mark]);
        return node;
      })));
  }

  refresh() {
    const marked = selections.lists.get(REMOVE) ?? new Set();
    for (const [row, node, mark] of this.marks ?? []) {
      const on = marked.has(row);
      node.classList.toggle("removed", on);
      [...mark.children].forEach((button, i) => button.setAttribute("aria-pressed", String(on === (i === 1))));
    }
  }
}

export class ClustersPage extends JobPage {
  constructor() {
    const k = h("input", { type: "number", min: 1, max: 10000, placeholder: "auto", "aria-label": "Number of clusters" });
    super("clusters", "Clusters", "Groups of similar images.", "Find clusters", h("label", { class: "field" }, "Number", k));
    this.k = k;
  }

  settings() { return this.k.value ? { k: Number(this.k.value) } : {}; }

  show({ groups, description }) {
    this.result.replaceChildren(h("p", { class: "count" }, description), h("div", { class: "cards" }, groups.map(({ name, size, rows, label }) => {
      const title = name === "noise" ? "No cluster" : `Cluster ${name}`;
      const open = async () => openList(title, await getRows(`/api/result/clusters/${name}`));
      return h("section", { class: "card cluster" },
        h("h2", {}, h("button", { class: "quiet", click: open }, title), h("span", { class: "number" }, number(size))),
        h("ul", { class: "mosaic" }, rows.map((row) => h("li", {}, tile(row)[0]))), label && h("p", { class: "hint" }, label));
    })));
  }
}

export class MapPage extends JobPage {
  constructor() {
    super("map", "Map", "Similar images are near each other. Scroll to zoom, drag to move, and draw a lasso around images.", "Compute the map");
  }

  async show({ groupings, description }) {
    const names = ["x", "y"], of = (name) => `/api/result/map/${name}`;
    const [rows, x, y, ...groups] = await Promise.all([getRows(of("rows")), ...names.map((name) => getFloats(of(name))),
      ...groupings.map(({ name }) => getShorts(of(name)))]);
    if (this.gone) return;
    this.rows = rows;
    const canvas = h("canvas", { tabindex: "0", "aria-label": "Map of the images. Arrow keys move it, plus and minus zoom, space selects." });
    this.tip = h("div", { class: "tip", hidden: true });
    this.chosen = h("div", { class: "row chosen", "aria-live": "polite" }, h("p", { class: "count" }, description));
    const colored = groupings.map(({ name }, i) => [i, name]), legend = h("ul", { class: "legend" });
    const color = (i) => {
      const names = groupings[i]?.groups ?? [];
      this.map.setGroups(groups[i] ?? new Uint16Array(x.length), names.length || 1);
      legend.replaceChildren(...names.slice(0, LEGEND).map((text, group) => {
        const dot = h("span", { class: "dot" });
        dot.style.background = `rgb(${groupColor(group, names.length)})`;
        return h("li", {}, dot, text);
      }), names.length > LEGEND ? `and ${number(names.length - LEGEND)} more` : "");
    };
    const tools = h("div", { class: "row" }, choice("Pointer", [[false, "Move"], [true, "Lasso"]], false, (on) => this.map.setLasso(on)),
      h("button", { click: () => this.map.fit() }, "Show all"),
      ...(colored.length > 1 ? [dropdown("Color", colored, 0, color)] : []), this.chosen);
    this.result.replaceChildren(tools, h("div", { class: "map" }, canvas, this.tip), legend);
    this.map?.destroy();
    this.map = createMap(canvas, { x, y, group: new Uint16Array(x.length), groups: 1, thumbnail: (point) => thumbnail(rows[point]) },
      { onHover: (...hit) => this.hover(...hit), onSelect: (points) => this.choose(points) });
    color(0);
    this.element.dataset.shown = x.length;
  }

  hover(point, x, y) {
    this.tip.hidden = point < 0;
    if (point < 0) return;
    this.tip.replaceChildren(...tile(this.rows[point]));
    this.tip.style.left = `${x + 14}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  choose(points) {
    const rows = [...points].map((point) => this.rows[point]);
    this.chosen.replaceChildren(h("p", { class: "count" }, `${plural(rows.length, "image")} chosen`), ...(rows.length ? [
      h("button", { class: "primary", click: () => openList("Images of the map", rows) }, "Show"), addAll(() => rows)] : []));
  }

  destroy() { super.destroy(); this.map?.destroy(); }
}
