// The frame of the page: views by address (the part behind #), sidebar, search box, dropped images, keyboard.
import { ask, h, notice, number } from "./dom.js";
import { emit, events, get, store, upload } from "./api.js";
import { Library, ListPage, SelectionPage } from "./pages.js";
import { ClustersPage, DuplicatesPage, MapPage } from "./groups.js";
import { ImagePage } from "./viewer.js";
import { selections } from "./selections.js";

const VIEWS = [["#/", "All images"], ["#/duplicates", "Duplicates"], ["#/clusters", "Clusters"], ["#/map", "Map"]];
const byId = (id) => document.getElementById(id);
const content = byId("content"), sidebar = byId("sidebar"), menu = byId("menu"), name = byId("name");
const RELOADED = "dino-reloaded"; // the version of the index for which this tab was reloaded
const positions = new Map(); // address -> where it was scrolled to, and the tile that had the focus

let page = null, address = null;

function open() {
  if (page) {
    positions.set(address, [scrollY, page.grid?.current ?? 0]);
    page.destroy();
  }
  address = location.hash || "#/";
  const [view, argument] = address.slice(2).split("/").map(decodeURIComponent);
  const pages = { image: () => new ImagePage(argument), duplicates: () => new DuplicatesPage(), clusters: () => new ClustersPage(),
    map: () => new MapPage(), selection: () => new SelectionPage(argument), list: () => new ListPage() };
  document.title = `${store.info.name} · dino explore`;
  page = (pages[view] ?? (() => new Library()))();
  content.replaceChildren(page.element);
  const [top, current] = positions.get(address) ?? [0, 0];
  if (page.grid) page.grid.current = current;
  page.grid?.layout();
  restore(top);
  closeMenu();
  drawSidebar();
}

// A page of which the rows are still loading is not high enough yet.
function restore(top, tries = 20) {
  scrollTo(0, top);
  if (scrollY < top && tries) setTimeout(() => restore(top, tries - 1), 25);
}

function drawSidebar() {
  const link = (href, text, count, more = {}) => h("a", { href, "aria-current": address === href ? "page" : null, ...more }, h("span", {}, text),
    count !== undefined && h("span", { class: "number" }, number(count)));
  const own = [...selections.lists].map(([title, rows]) => {
    const href = `#/selection/${encodeURIComponent(title)}`, current = title === selections.current;
    return h("li", {}, h("input", { type: "radio", name: "current", ...(current ? { checked: true } : {}), "aria-label": `Ticks change ${title}`,
      title: "Ticks change this selection", change: () => selections.use(title) }), link(href, title, rows.size));
  });
  const create = async () => {
    const title = await ask("Name of the selection", { value: `Selection ${selections.lists.size + 1}`, action: "Create" });
    if (title) await selections.create(title);
  };
  sidebar.replaceChildren(h("p", { class: "index-name", title: store.info.path }, store.info.name),
    h("ul", {}, VIEWS.map(([href, text]) => h("li", {}, link(href, text, href === "#/" ? store.info.count : undefined)))),
    h("h2", {}, "Selections"), h("ul", { class: "selections" }, own),
    ...(own.length ? [] : [h("p", { class: "hint" }, "Tick images to start one.")]),
    store.info.read_only ? h("p", { class: "hint" }, "Read-only: changes are not saved.") : h("button", { class: "quiet", click: create }, "New selection"));
}

function back() { // within the page
  positions.size ? history.back() : location.hash = "#/";
}

function closeMenu() {
  document.body.classList.remove("menu-open");
  menu.setAttribute("aria-expanded", "false");
}

async function searchImage(file) {
  if (!file) return;
  notice("Searching …");
  try {
    const { source } = await upload(file);
    location.hash = `#/image/${source}`;
  } catch (error) {
    notice(error.message, "error");
  }
}

function listen() {
  addEventListener("hashchange", open);
  events.addEventListener("back", back);
  events.addEventListener("selections", () => {
    drawSidebar();
    if (page instanceof SelectionPage) page.update();
  });
  menu.addEventListener("click", () => {
    const opened = document.body.classList.toggle("menu-open");
    menu.setAttribute("aria-expanded", opened);
  });
  let typing;
  const find = () => {
    store.filters.name = name.value.trim();
    return page instanceof Library ? page.load() : (location.hash = "#/");
  };
  name.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(find, 200); });
  byId("find").addEventListener("submit", async (event) => {
    event.preventDefault();
    clearTimeout(typing);
    await find(); // the first tile is that of the new rows
    page.grid?.focus(0);
  });
  byId("file").addEventListener("change", (event) => { searchImage(event.target.files[0]); event.target.value = ""; });
  byId("size").value = store.size;
  byId("size").addEventListener("input", (event) => {
    store.size = Number(event.target.value);
    localStorage.setItem("dino-size", store.size);
    emit("size");
  });

  const drop = byId("drop"), hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => { if (hasFile(event)) { event.preventDefault(); drop.classList.remove("hidden"); } });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.add("hidden"); });
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    drop.classList.add("hidden");
    searchImage(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => { if (event.clipboardData.files.length) searchImage(event.clipboardData.files[0]); });
  addEventListener("keydown", (event) => {
    const writing = event.target.matches?.("input:not([type=checkbox]):not([type=radio]):not([type=range]), select, textarea");
    if (event.key === "/" && !writing) {
      event.preventDefault();
      name.focus();
      name.select();
    } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      if (document.body.classList.contains("menu-open")) closeMenu();
      else if (event.target === name) { name.value = ""; find(); name.blur(); }
      else if (address !== "#/") back();
    } else if (event.key.startsWith("Arrow") && (event.target === document.body || event.target === content) && page.grid) {
      event.preventDefault();
      page.grid.focus();
    }
  });

  const offline = byId("offline");
  let retry;
  events.addEventListener("offline", ({ detail }) => {
    offline.textContent = detail;
    offline.hidden = false;
    clearTimeout(retry);
    retry = setTimeout(() => get("/api/job").catch(() => {}), 2000);
  });
  events.addEventListener("online", () => {
    if (offline.hidden) return;
    offline.hidden = true;
    clearTimeout(retry);
    location.reload(); // the index may be another one
  });
  events.addEventListener("outdated", ({ detail }) => {
    if (store.outdated) return;
    if (sessionStorage.getItem(RELOADED) === detail) { // without success: do not repeat it
      emit("offline", "The server shows another index, or another state of it. Close this page and open the address that dino explore printed.");
      return;
    }
    store.outdated = true;
    sessionStorage.setItem(RELOADED, detail);
    location.reload();
  });
}

async function start() {
  if (location.search) history.replaceState(null, "", `/${location.hash}`); // the token is in a cookie now
  store.size = Number(localStorage.getItem("dino-size")) || 152;
  store.info = await get("/api/index");
  await selections.load();
  listen();
  if (sessionStorage.getItem(RELOADED) === store.info.version) {
    sessionStorage.removeItem(RELOADED);
    notice("The server shows another index, or another state of it, so the page was reloaded. If you have just changed a selection, check it.", "error");
  }
  open();
}

start().catch((error) => content.replaceChildren(h("p", { class: "warning" }, error.message)));
