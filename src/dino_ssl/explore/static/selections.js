// Selections: named lists of images, saved by the server at every change. Ticks change the current one.
import { emit, get, post, store } from "./api.js";
import { notice } from "./dom.js";

const CURRENT = "dino-current-selection";
export const REMOVE = "Remove"; // the marked duplicates: never the current selection by itself, and no class folder
const others = new BroadcastChannel("dino-selections"); // tabs of this page tell each other to read again

export const selections = {
  version: 0,
  lists: new Map(), // name -> Set of rows
  missing: new Map(), // name -> number of images that are not in the index any more
  current: localStorage.getItem(CURRENT) ?? "",
  queue: Promise.resolve(true),
  pending: 0,
  stale: false,

  get rows() { return this.lists.get(this.current) ?? new Set(); },
  has(row) { return this.rows.has(row); },

  use(name) {
    this.current = name;
    localStorage.setItem(CURRENT, name);
    emit("selections");
  },

  async load() {
    const state = await get("/api/selections");
    this.stale = this.pending > 0; // changes that the server has not applied yet are shown already
    if (this.stale || state.version < this.version) return; // or was sent before the last of them
    this.version = state.version;
    this.lists = new Map(state.selections.map(({ name, rows }) => [name, new Set(rows)]));
    this.missing = new Map(state.selections.map(({ name, missing }) => [name, missing]));
    if (!this.lists.has(this.current)) this.current = [...this.lists.keys()].find((name) => name !== REMOVE) ?? "";
    emit("selections");
  },

  busy(change) {
    this.pending += change;
    document.getElementById("sidebar").setAttribute("aria-busy", this.pending > 0);
  },

  // Send changes one after another. If another tab changed something in between, all selections are read again.
  change(operation, selection, data = {}) {
    this.busy(+1);
    return this.queue = this.queue.then(async () => {
      let done = true;
      try {
        const { version } = await post("/api/selections", { operation, selection, version: this.version, ...data });
        const unseen = version !== this.version + 1;
        this.version = version;
        others.postMessage(version);
        if (unseen && (operation === "add" || operation === "remove")) notice("Merged with the changes of another tab.");
        this.stale ||= unseen || operation === "rename" || operation === "delete";
      } catch (error) {
        notice(error.message, "error");
        this.stale = true;
        done = false;
      }
      this.busy(-1);
      if (this.stale && !this.pending) await this.load().catch(() => {});
      return done;
    });
  },

  async create(selection) {
    const created = await this.change("create", selection);
    if (created) {
      this.lists.set(selection.trim(), new Set());
      this.use(selection.trim());
    }
  },

  async toggle(rows, on, selection = this.current || "Selection 1") {
    if (!this.lists.has(selection)) {
      if (!on) return emit("selections");
      this.lists.set(selection, new Set());
      this.change("create", selection);
      if (!this.lists.has(this.current) && selection !== REMOVE) this.use(selection);
    }
    const list = this.lists.get(selection);
    for (const row of rows) on ? list.add(row) : list.delete(row); // shown at once; read again if it fails
    emit("selections");
    await this.change(on ? "add" : "remove", selection, { rows });
  },
};

others.onmessage = ({ data }) => { if (data !== selections.version) selections.load().catch(() => {}); };
addEventListener("focus", () => selections.load().catch(() => {})); // other browsers, other servers
addEventListener("beforeunload", (event) => { if (selections.pending && !store.outdated) event.preventDefault(); });
