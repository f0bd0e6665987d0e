// Pages that are grids: the library, a selection, a list of images that another page chose.
import { ask, h, notice, number, plural } from "./dom.js";
import { get, getRows, post, store } from "./api.js";
import { Grid } from "./grid.js";
import { filters } from "./filters.js";
import { REMOVE, selections } from "./selections.js";

// Add all images of a list to the current selection.
export const addAll = (rows) => h("button", { click: async () => {
  await selections.toggle([...rows()], true);
  notice(`${plural(rows().length, "image")} in ${selections.current}`);
} }, "Select all");

class GridPage {
  constructor(title, ...controls) {
    this.heading = h("h1", {}, title);
    this.count = h("p", { class: "count", "aria-live": "polite" });
    this.grid = new Grid({ label: title });
    this.element = h("div", {}, h("div", { class: "heading" }, h("div", {}, this.heading, this.count), ...controls), this.grid.element);
  }

  show(rows) {
    this.grid.show(rows);
    this.count.textContent = plural(rows.length, "image");
    this.element.dataset.shown = rows.length;
  }

  destroy() { this.grid.destroy(); }
}

export class Library extends GridPage {
  constructor() {
    super("All images", filters(() => this.load()), addAll(() => this.grid.rows));
    this.load();
  }

  async load() {
    this.abort?.abort();
    this.abort = new AbortController();
    const { filters: { name } } = store;
    this.heading.textContent = name ? `“${name}”` : "All images";
    try {
      this.show(await getRows("/api/rows", store.filters, this.abort.signal));
      if (!this.grid.rows.length) this.count.textContent = store.info.count ? "No image matches. Change the name, the folder or the label."
        : "This index has no images that can be read.";
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message, "error");
    }
  }
}

// A list in memory: a cluster, a lasso on the map. It is gone after a reload, as it was not saved.
export const list = { title: "Images", rows: [] };
export class ListPage extends GridPage {
  constructor() {
    super(list.title, addAll(() => this.grid.rows));
    this.show(list.rows);
  }
}

export class SelectionPage extends GridPage {
  constructor(name) {
    super(name);
    this.name = name;
    const { read_only: readOnly, export: folder } = store.info;
    const link = (kind) => h("a", { class: "button", href: `/api/selections/${encodeURIComponent(name)}/${kind}`, download: "" }, kind.toUpperCase());
    this.element.firstChild.append(h("div", { class: "row" }, link("csv"), link("json"),
      ...(readOnly ? [] : [
        ...(folder ? [h("button", { click: () => this.export("copy") }, "Copy files"), h("button", { click: () => this.export("link") }, "Link files")] : []),
        h("button", { click: () => this.rename() }, "Rename"), h("button", { click: () => this.delete() }, "Delete")])));
    selections.use(name);
    this.update();
  }

  update() {
    const rows = selections.lists.get(this.name);
    if (!rows) { location.hash = "#/"; return; }
    this.show([...rows].sort((a, b) => a - b));
    const missing = selections.missing.get(this.name);
    if (missing) this.count.textContent += `, and ${number(missing)} that are no longer in the index`;
    if (!rows.size) this.count.textContent = "Empty. Tick images, and they appear here.";
  }

  async rename() {
    const to = await ask("New name", { value: this.name, action: "Rename" });
    if (to && to !== this.name && await selections.change("rename", this.name, { to })) {
      selections.use(to.trim());
      location.replace(`#/selection/${encodeURIComponent(to.trim())}`);
    }
  }

  async delete() {
    const text = "The list is deleted. The images are not.";
    if (await ask(`Delete ${this.name}?`, { action: "Delete", text }) && await selections.change("delete", this.name)) location.hash = "#/";
  }

  async export(how) {
    const text = `All selections but ${REMOVE} become folders in ${store.info.export}. Files that exist are kept.`;
    if (!(await ask(how === "copy" ? "Copy all selections?" : "Link all selections?", { action: how === "copy" ? "Copy" : "Link", text }))) return;
    try {
      const { written, kept, missing } = await post("/api/export", { how });
      notice([`${plural(written, "file")} written to ${store.info.export}`, kept && `${number(kept)} existed and were kept`,
        missing && `${number(missing)} have no file`].filter(Boolean).join("; "));
    } catch (error) {
      notice(error.message, "error");
    }
  }
}

// A page of a long computation: start it, show its progress, cancel it, and show its result.
export class JobPage {
  constructor(kind, title, text, start, ...options) {
    this.kind = kind;
    this.bar = h("progress", { "aria-label": "Progress" });
    this.message = h("span", { role: "status" });
    this.cancel = h("button", { click: () => post("/api/job/cancel").catch((error) => notice(error.message, "error")) }, "Cancel");
    this.working = h("div", { class: "row working-row", hidden: true }, this.bar, this.message, this.cancel);
    this.start = h("button", { class: "primary", click: () => this.run() }, start);
    this.result = h("div", { class: "result" });
    this.options = options;
    this.element = h("div", {}, h("div", { class: "heading" }, h("div", {}, h("h1", {}, title), h("p", { class: "count" }, text)),
      h("div", { class: "row" }, ...options, this.start)), this.working, this.result);
    this.poll(true);
  }

  settings() { return {}; }
  destroy() { clearTimeout(this.timer); this.gone = true; }

  async run() {
    try {
      await post("/api/job", { kind: this.kind, ...this.settings() });
      this.wasRunning = true; // it may have ended already
      this.poll();
    } catch (error) {
      notice(error.message, "error");
    }
  }

  async poll(first = false) {
    clearTimeout(this.timer);
    let state;
    try { state = await get("/api/job"); } catch { state = null; }
    if (this.gone) return;
    const running = state?.state === "running", mine = state?.kind === this.kind;
    this.working.hidden = !running;
    this.start.disabled = running;
    if (running) {
      state.total ? (this.bar.max = state.total, this.bar.value = state.done) : this.bar.removeAttribute("value");
      this.message.textContent = (mine ? `Computing: ${state.step}` : `Computing the ${state.kind}`) + (state.total ? `, ${number(state.done)} of ${number(state.total)}` : " …");
      this.timer = setTimeout(() => this.poll(), 400);
      this.wasRunning = true;
      return;
    }
    if (mine && state.state === "failed" && this.wasRunning) notice(state.message, "error");
    if (mine && state.state === "cancelled" && this.wasRunning) notice("Cancelled.");
    if (state?.results.includes(this.kind) && (first || this.wasRunning)) {
      try { this.show(await get(`/api/result/${this.kind}`)); } catch (error) { notice(error.message, "error"); }
    }
    this.wasRunning = false;
  }
}
