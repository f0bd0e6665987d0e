// The folder and the label that the library and every search are limited to.
import { dropdown, h, number } from "./dom.js";
import { store } from "./api.js";

export function filters(onChange) {
  const { folders, labels } = store.info;
  const set = (name) => (value) => { store.filters[name] = value; onChange(); };
  const options = (all, list) => [["", all], ...list.map(({ name, count }) => [name, `${name} (${number(count)})`])];
  return h("div", { class: "filters" },
    folders.length > 1 && dropdown("Folder", options("All folders", folders), store.filters.folder, set("folder")),
    labels.length > 1 && dropdown("Label", options("All labels", labels), store.filters.label, set("label")));
}
