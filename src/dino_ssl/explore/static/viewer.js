// One image: similar images, by a region too; what a patch attends to; colors of the patches; masks.
import { choice, dropdown, fileName, h, notice, number } from "./dom.js";
import { emit, get, getFloats, loadItems, post, store } from "./api.js";
import { Grid } from "./grid.js";
import { filters } from "./filters.js";
import { selections } from "./selections.js";

const MODES = [["similar", "Similar"], ["attention", "Attention"], ["colors", "Patch colors"], ["mask", "Mask"]];
const HINTS = {
  similar: "Drag over a part of the image to search for that part.",
  attention: "Click a patch to see what it attends to. Arrow keys move it.",
  colors: "The first three principal components of the patch features as red, green and blue.",
  mask: "The mask of this image: one color for each label.",
};
const RESULTS = 300, PATCH_IMAGES = 24, PATCH_BATCH = 4;

let mode = "similar"; // stays when another image is opened
let view = { layer: "", head: "mean", show: "attention" };

// The colors of a heat map, from dark violet to yellow, with an opacity that grows with the value.
const STOPS = [[20, 11, 54], [101, 26, 128], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
function heat(value) {
  const position = Math.min(0.999, Math.max(0, value)) * (STOPS.length - 1), i = Math.floor(position), t = position - i;
  return [0, 1, 2].map((channel) => STOPS[i][channel] * (1 - t) + STOPS[i + 1][channel] * t);
}

export class ImagePage {
  constructor(source) {
    this.source = source;
    this.isUpload = !/^\d{1,9}$/.test(source);
    this.abort = new AbortController();
    this.results = [];
    this.similarity = new Map();
    this.boxes = null;
    this.grid = new Grid({
      label: "Results",
      badge: (position) => this.similarity.get(this.grid.rows[position])?.toFixed(2) ?? "",
      box: (position) => this.boxes?.get(this.grid.rows[position]) ?? null,
    });
    this.image = h("img", { src: `/api/image/${source}?v=${store.info.version}`, alt: "The image", draggable: "false",
      load: () => this.stage.style.setProperty("--aspect", this.image.naturalWidth / this.image.naturalHeight),
      error: () => this.caption.append(h("p", { class: "warning" }, "This image cannot be read any more.")) });
    this.canvas = h("canvas", { "aria-hidden": "true", width: 1, height: 1 });
    this.overlay = h("img", { class: "overlay", alt: "", hidden: true });
    this.mark = h("span", { class: "mark", hidden: true });
    this.stage = h("div", { class: "stage", tabindex: "0", role: "application", "aria-label": "The image",
      pointerdown: (event) => this.press(event), keydown: (event) => this.onKey(event) },
      this.image, this.canvas, this.overlay, this.mark);
    this.tools = h("div", { class: "tools" });
    this.caption = h("div", { class: "about" });
    this.heading = h("h2", { "aria-live": "polite" }, "Similar images");
    const modes = MODES.filter(([name]) => name !== "mask" || store.info.masks && !this.isUpload);
    if (!modes.some(([name]) => name === mode)) mode = "similar";
    this.element = h("div", { class: "viewer" },
      h("section", { class: "subject", "aria-label": "Image" },
        h("div", { class: "row" }, h("button", { class: "quiet", click: () => emit("back") }, "‹ Back"),
          choice("What to show", modes, mode, (name) => this.setMode(name))),
        this.stage, this.tools, this.caption),
      h("section", { class: "results", "aria-label": "Results" },
        h("div", { class: "heading" }, this.heading, filters(() => this.search())), this.grid.element));
    this.describe();
    this.search();
    this.setMode(mode);
  }

  destroy() {
    this.abort.abort();
    this.patchAbort?.abort();
    this.grid.destroy();
  }

  async describe() {
    if (this.isUpload) return this.caption.append(h("h1", {}, "Your image"));
    const row = Number(this.source);
    await loadItems([row]).catch(() => {});
    const item = store.items.get(row);
    if (!item) return;
    document.title = `${fileName(item.name)} · dino explore`;
    this.image.alt = item.name;
    const tick = h("input", { type: "checkbox", change: (event) => selections.toggle([row], event.target.checked) });
    tick.checked = selections.has(row);
    this.caption.prepend(h("h1", {}, fileName(item.name)),
      h("p", {}, [item.name, `${number(item.width)} × ${number(item.height)}`, item.label].filter(Boolean).join(" · ")),
      h("label", { class: "button" }, tick, "Select"));
  }

  // -- search

  async search(region = this.region) {
    this.region = region;
    this.searchAbort?.abort();
    this.searchAbort = new AbortController();
    const [x, y, w, h] = region ?? [], { folder, label } = store.filters;
    try {
      const found = await get("/api/search", { source: this.source, k: RESULTS, x, y, w, h, folder, label }, this.searchAbort.signal);
      this.results = found.rows;
      this.similarity = new Map(found.rows.map((row, i) => [row, found.similarity[i]]));
      if (mode !== "attention" || this.patch === undefined || this.patch < 0) this.showResults();
      else this.nearestPatches();
    } catch (error) {
      if (error.name !== "AbortError") { this.heading.textContent = "No results"; notice(error.message, "error"); }
    }
  }

  showResults() {
    this.boxes = null;
    this.heading.textContent = this.region ? "Images with a similar part" : "Similar images";
    this.grid.show(this.results);
    performance.mark("results-shown");
  }

  // -- modes

  setMode(name) {
    mode = name;
    this.stage.dataset.mode = name;
    this.tools.replaceChildren(h("p", { class: "hint" }, HINTS[name]));
    this.canvas.hidden = name !== "attention";
    this.overlay.hidden = name !== "colors" && name !== "mask";
    this.mark.hidden = true;
    this.patchAbort?.abort();
    if (this.boxes) this.showResults();
    if (name === "similar") this.drawRegion();
    if (name === "attention") this.openAttention();
    if (!this.overlay.hidden) this.showOverlay(name);
  }

  showOverlay(name) {
    this.overlay.className = `overlay ${name}`;
    this.overlay.onerror = () => {
      this.overlay.hidden = true;
      this.tools.append(h("p", { class: "warning" }, name === "mask" ? "There is no mask for this image." : "The colors cannot be computed."));
    };
    this.overlay.src = `/api/${name}/${this.source}?v=${store.info.version}`;
    const opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.75, "aria-label": "Opacity",
      input: (event) => { this.overlay.style.opacity = event.target.value; } });
    this.overlay.style.opacity = 0.75;
    this.tools.append(h("label", { class: "field" }, "Opacity", opacity));
  }

  // -- pointer: a region in the mode Similar, a patch in the mode Attention

  press(event) {
    if (event.button !== 0 || (mode !== "similar" && mode !== "attention")) return;
    const { left, top, width, height } = this.image.getBoundingClientRect();
    const at = ({ clientX, clientY }) => [(clientX - left) / width, (clientY - top) / height].map((v) => Math.min(1, Math.max(0, v)));
    const from = at(event);
    if (mode === "attention") {
      if (this.layout) this.choosePatch(Math.min(this.layout.rows - 1, Math.floor(from[1] * this.layout.rows)) * this.layout.columns
        + Math.min(this.layout.columns - 1, Math.floor(from[0] * this.layout.columns)));
      return;
    }
    event.preventDefault();
    this.stage.focus({ preventScroll: true });
    this.stage.setPointerCapture(event.pointerId);
    const boxTo = (to) => [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1])];
    const move = (next) => { this.placeMark(boxTo(at(next))); };
    const stop = (next) => {
      this.stage.removeEventListener("pointermove", move);
      const region = boxTo(at(next));
      if (next.type === "pointerup" && region[2] > 0.02 && region[3] > 0.02) this.search(region);
      else if (next.type === "pointerup" && this.region) this.search(null);
      this.drawRegion();
    };
    this.stage.addEventListener("pointermove", move);
    for (const end of ["pointerup", "pointercancel"]) this.stage.addEventListener(end, stop, { once: true });
  }

  placeMark(box) {
    this.mark.hidden = !box;
    if (box) for (const [i, side] of ["left", "top", "width", "height"].entries()) this.mark.style[side] = `${100 * box[i]}%`;
  }

  drawRegion() {
    this.placeMark(this.region);
    const clear = h("button", { click: () => { this.search(null); this.drawRegion(); } }, "Search for the whole image");
    this.tools.replaceChildren(h("p", { class: "hint" }, HINTS.similar), ...(this.region ? [clear] : []));
  }

  onKey(event) {
    if (mode === "similar" && event.key === "r") {
      this.search(this.region ? null : [0.25, 0.25, 0.5, 0.5]);
      this.drawRegion();
    } else if (mode === "similar" && this.region && event.key.startsWith("Arrow")) {
      event.preventDefault();
      const side = event.key === "ArrowLeft" || event.key === "ArrowRight" ? 0 : 1, sign = /Right|Down/.test(event.key) ? 1 : -1;
      const region = [...this.region], part = event.shiftKey ? side + 2 : side;
      region[part] = Math.min(part < 2 ? 1 - region[part + 2] : 1 - region[side], Math.max(part < 2 ? 0 : 0.05, region[part] + sign * 0.05));
      this.search(region);
      this.drawRegion();
    } else if (mode === "attention" && this.layout && event.key.startsWith("Arrow")) {
      event.preventDefault();
      const { rows, columns } = this.layout, from = this.patch >= 0 ? this.patch : Math.floor(rows / 2) * columns + Math.floor(columns / 2);
      const steps = { ArrowLeft: from % columns ? -1 : 0, ArrowRight: (from + 1) % columns ? 1 : 0,
        ArrowUp: from >= columns ? -columns : 0, ArrowDown: from < columns * (rows - 1) ? columns : 0 };
      this.choosePatch(from + steps[event.key]);
    }
  }

  // -- attention

  async openAttention() {
    this.tools.append(h("p", { class: "hint working" }, "Computing the features of the patches …"));
    try {
      this.layout ??= await get(`/api/patches/${this.source}`, {}, this.abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.tools.replaceChildren(h("p", { class: "warning" }, error.message));
      return;
    }
    if (mode !== "attention" || this.abort.signal.aborted) return;
    const { rows, columns, layers, heads } = this.layout;
    [this.canvas.width, this.canvas.height] = [columns, rows];
    if (!layers) view.show = "similarity"; // a network without attention
    if (view.layer === "" || view.layer >= layers) view.layer = layers - 1;
    if (view.head !== "mean" && view.head >= heads) view.head = "mean";
    const range = (count) => [...Array(count).keys()];
    const change = (name, convert = Number) => (value) => { view[name] = convert(value); this.drawAttention(); };
    this.tools.replaceChildren(h("p", { class: "hint" }, HINTS.attention), ...(!layers ? [] : [h("div", { class: "row" },
      choice("Map", [["attention", "Attention"], ["similarity", "Similarity"]], view.show, change("show", String)),
      h("button", { click: () => this.choosePatch(-1) }, "[CLS]"),
      dropdown("Layer", range(layers).map((i) => [i, i === layers - 1 ? `${i} (last)` : i]), view.layer, change("layer")),
      dropdown("Head", [["mean", "mean"], ...range(heads).map((i) => [i, i])], view.head, change("head", (v) => v === "mean" ? v : Number(v))))]));
    this.choosePatch(this.patch ?? (layers ? -1 : Math.floor(rows / 2) * columns + Math.floor(columns / 2)), false);
  }

  choosePatch(patch, searching = true) {
    this.patch = patch;
    const { rows, columns } = this.layout;
    this.placeMark(patch < 0 ? null : [patch % columns / columns, Math.floor(patch / columns) / rows, 1 / columns, 1 / rows]);
    this.drawAttention();
    clearTimeout(this.timer);
    this.patchAbort?.abort();
    if (patch < 0) { if (this.boxes) this.showResults(); } else if (searching) this.timer = setTimeout(() => this.nearestPatches(), 250);
  }

  async drawAttention() {
    const { rows, columns, heads } = this.layout, count = rows * columns, patch = this.patch;
    const similar = patch >= 0 && view.show === "similarity";
    try {
      const values = similar ? await getFloats(`/api/similarity/${this.source}`, { patch }, this.abort.signal)
        : await getFloats(`/api/attention/${this.source}`, { patch, layer: view.layer }, this.abort.signal);
      if (patch !== this.patch) return;
      const map = new Float32Array(count);
      if (similar) map.set(values.map((v) => Math.max(0, v)));
      else for (let head = 0; head < heads; head++) {
        if (view.head === "mean" || view.head === head) for (let i = 0; i < count; i++) map[i] += values[head * count + i];
      }
      this.drawHeat(map);
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message, "error");
    }
  }

  drawHeat(map) {
    const context = this.canvas.getContext("2d"), picture = context.createImageData(this.canvas.width, this.canvas.height);
    const least = Math.min(...map), range = Math.max(...map) - least || 1;
    map.forEach((value, i) => {
      const level = (value - least) / range;
      picture.data.set([...heat(level), 200 - 80 * level], 4 * i); // the image is dark where the map is low
    });
    context.putImageData(picture, 0, 0);
    this.stage.dataset.drawn = `${this.patch}`;
  }

  // Compare the patch with those of the first results, a few images at a time, and show the best ones first.
  async nearestPatches() {
    this.patchAbort?.abort();
    const { signal } = this.patchAbort = new AbortController();
    const rows = this.results.filter((row) => String(row) !== this.source).slice(0, PATCH_IMAGES), best = [];
    try {
      for (let start = 0; start < rows.length; start += PATCH_BATCH) {
        this.heading.textContent = `Nearest patches, ${start} of ${rows.length}`;
        const patches = await post("/api/nearest-patches", { source: this.source, patch: this.patch, rows: rows.slice(start, start + PATCH_BATCH) }, signal);
        if (signal.aborted) return;
        best.push(...patches);
        best.sort((a, b) => b.similarity - a.similarity);
        this.boxes = new Map(best.map(({ row, box }) => [row, box]));
        this.similarity = new Map([...this.similarity, ...best.map(({ row, similarity }) => [row, similarity])]);
        this.grid.show(best.map(({ row }) => row));
      }
      this.heading.textContent = "Nearest patches";
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message, "error");
    }
  }
}
