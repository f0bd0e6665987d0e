// A grid of thumbnails that holds only the tiles on the screen, so that 100,000 images scroll as 100 do.
import { fileName, h } from "./dom.js";
import { loadItems, store, thumbnail, events } from "./api.js";
import { selections } from "./selections.js";

const GAP = 14, CAPTION = 26, OVERSCAN = 400;
const MAX_HEIGHT = 15e6; // pixels of an element, which browsers limit; beyond it, scrolling is scaled

export class Grid {
  // badge(position): a short text on the tile, or "". box(position): [x, y, w, h] as shares of the image, or null.
  constructor({ label, badge = () => "", box = () => null }) {
    this.rows = [];
    this.badge = badge;
    this.box = box;
    this.tiles = new Map();
    this.current = 0;
    this.anchor = 0;
    this.element = h("ul", { class: "grid", "aria-label": label, keydown: (event) => this.onKey(event) });
    this.abort = new AbortController();
    const options = { signal: this.abort.signal };
    document.addEventListener("scroll", () => this.render(), { ...options, capture: true, passive: true });
    events.addEventListener("selections", () => this.refresh(), options);
    events.addEventListener("size", () => this.layout(), options);
    this.observer = new ResizeObserver(() => this.layout());
    this.observer.observe(this.element);
  }

  destroy() {
    this.abort.abort();
    this.observer.disconnect();
  }

  show(rows) {
    this.rows = rows;
    this.current = Math.max(0, Math.min(this.current, rows.length - 1));
    for (const tile of this.tiles.values()) tile.node.remove();
    this.tiles.clear();
    this.layout();
  }

  layout() {
    const width = this.element.clientWidth, size = Math.min(store.size, (width - GAP) / 2);
    if (!width) return;
    this.columns = Math.max(1, Math.floor((width + GAP) / (size + GAP)));
    this.side = (width + GAP) / this.columns - GAP;
    this.step = this.side + CAPTION + GAP;
    this.height = Math.ceil(this.rows.length / this.columns) * this.step;
    this.element.style.height = `${Math.min(this.height, MAX_HEIGHT)}px`;
    for (const [position, tile] of this.tiles) this.place(position, tile.node);
    this.render();
  }

  // The pixels of the grid above the window, and the shift of tiles if scrolling is scaled.
  scrolled() {
    const above = -this.element.getBoundingClientRect().top, shown = Math.min(this.height, MAX_HEIGHT);
    const room = Math.max(1, shown - innerHeight), share = Math.max(0, Math.min(1, above / room));
    return [above, this.height > MAX_HEIGHT ? share * (this.height - shown) : 0];
  }

  place(position, node) {
    const [row, column] = [Math.floor(position / this.columns), position % this.columns];
    node.style.width = `${this.side}px`;
    node.style.transform = `translate(${column * (this.side + GAP)}px, ${row * this.step - (this.shift ?? 0)}px)`;
  }

  render() {
    if (!this.step || !this.element.isConnected) return;
    const [above, shift] = this.scrolled();
    if (shift !== (this.shift ?? 0)) {
      this.shift = shift;
      for (const [position, tile] of this.tiles) this.place(position, tile.node);
    }
    const first = Math.max(0, Math.floor((above + shift - OVERSCAN) / this.step)) * this.columns;
    const last = Math.min(this.rows.length, Math.ceil((above + shift + innerHeight + OVERSCAN) / this.step) * this.columns);
    for (const [position, tile] of this.tiles) {
      if ((position < first || position >= last) && !tile.node.contains(document.activeElement)) {
        tile.image.removeAttribute("src"); // cancels a request that has not been answered
        tile.node.remove();
        this.tiles.delete(position);
      }
    }
    const added = document.createDocumentFragment();
    for (let position = first; position < last; position++) {
      if (!this.tiles.has(position)) added.append(this.add(position));
    }
    this.element.append(added);
    clearTimeout(this.timer); // while scrolling fast, tiles that pass by load nothing
    this.timer = setTimeout(() => this.load(), added.childNodes.length > 60 && this.loaded ? 80 : 0);
  }

  load() {
    this.loaded = true;
    const rows = [];
    for (const [position, tile] of this.tiles) {
      if (!tile.image.hasAttribute("src")) tile.image.src = thumbnail(this.rows[position]);
      if (!store.items.has(this.rows[position])) rows.push(this.rows[position]);
    }
    if (rows.length) loadItems(rows).then(() => this.caption(), () => {});
  }

  add(position) {
    const row = this.rows[position], badge = this.badge(position), box = this.box(position);
    const image = h("img", { alt: "", draggable: "false", error: () => node.classList.add("broken") });
    const check = h("input", { type: "checkbox", tabindex: "-1", click: (event) => this.check(position, event) });
    const link = h("a", { href: `#/image/${row}`, tabindex: position === this.current ? "0" : "-1",
      focus: () => this.setCurrent(position) }, image);
    if (box) {
      const mark = h("span", { class: "box", "aria-hidden": "true" });
      for (const [i, side] of ["left", "top", "width", "height"].entries()) mark.style[side] = `${100 * box[i]}%`;
      const fit = h("span", { class: "fit" }, image, mark);
      image.addEventListener("load", () => {
        const aspect = image.naturalWidth / image.naturalHeight;
        fit.style.width = `${100 * Math.min(1, aspect)}%`;
        fit.style.height = `${100 / Math.max(1, aspect)}%`;
      });
      link.append(fit);
    }
    const name = h("span", { class: "name" });
    const node = h("li", { class: "tile", "aria-setsize": this.rows.length, "aria-posinset": position + 1 }, link,
      h("label", { class: "check" }, check), h("span", { class: "caption" }, name, badge && h("span", { class: "badge" }, badge)));
    const tile = { node, link, image, check, name };
    this.tiles.set(position, tile);
    this.place(position, node);
    this.describe(position, tile);
    return node;
  }

  describe(position, tile) {
    const row = this.rows[position], item = store.items.get(row), selected = selections.has(row);
    tile.check.checked = selected;
    tile.node.classList.toggle("selected", selected);
    if (item) {
      tile.name.textContent = fileName(item.name);
      tile.link.title = item.name;
      tile.image.alt = item.label ? `${item.name}, ${item.label}` : item.name;
      tile.check.setAttribute("aria-label", `Select ${item.name}`);
    }
  }

  caption() { for (const [position, tile] of this.tiles) this.describe(position, tile); }
  refresh() { this.caption(); }

  check(position, event) {
    const [from, to] = event.shiftKey ? [this.anchor, position].sort((a, b) => a - b) : [position, position];
    selections.toggle([...this.rows.slice(from, to + 1)], event.target.checked);
    this.anchor = position;
  }

  setCurrent(position) {
    const before = this.tiles.get(this.current), tile = this.tiles.get(position);
    if (before) before.link.tabIndex = -1;
    if (tile) tile.link.tabIndex = 0;
    this.current = position;
  }

  focus(position = this.current) {
    if (!this.rows.length) return;
    this.setCurrent(Math.max(0, Math.min(this.rows.length - 1, position)));
    const top = Math.floor(this.current / this.columns) * this.step - (this.shift ?? 0);
    const { top: above } = this.element.getBoundingClientRect(), bar = 80;
    if (above + top < bar) scrollBy(0, above + top - bar);
    else if (above + top + this.step > innerHeight) scrollBy(0, above + top + this.step - innerHeight);
    this.render();
    this.tiles.get(this.current)?.link.focus({ preventScroll: true });
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(innerHeight / this.step)) * this.columns;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page,
      Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      const step = steps[event.key], position = this.current + step;
      if (Number.isFinite(step) && Math.abs(step) > 1 && (position < 0 || position >= this.rows.length) && !event.key.startsWith("Page")) return;
      event.preventDefault();
      this.focus(position);
    } else if (event.key === " " || event.key === "x") {
      event.preventDefault();
      const row = this.rows[this.current];
      selections.toggle([row], !selections.has(row));
    }
  }
}
