// Elements of the page. Text from files is only ever set as text, never as HTML.

export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const number = (value) => value.toLocaleString("en");
export const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
export const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

export function notice(text, kind = "") {
  const node = h("p", { class: `notice ${kind}` }, text);
  document.getElementById("notices").append(node);
  setTimeout(() => node.remove(), kind === "error" ? 9000 : 4000);
}

// A row of buttons of which one is pressed.
export function choice(label, options, chosen, onChoose) {
  const group = h("div", { class: "choice", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    const press = () => {
      for (const other of group.children) other.setAttribute("aria-pressed", other === button);
      onChoose(value);
    };
    const button = h("button", { type: "button", "aria-pressed": String(value === chosen), click: press }, text);
    group.append(button);
  }
  return group;
}

export function dropdown(label, options, chosen, onChange) {
  const list = options.map(([value, text]) => h("option", { value, selected: String(value) === String(chosen) }, text));
  const select = h("select", { "aria-label": label, change: (event) => onChange(event.target.value) }, list);
  return h("label", { class: "field" }, h("span", { "aria-hidden": "true" }, label), select);
}

// Ask for a line of text, or for a confirmation if there is no value; resolves to null if cancelled.
export function ask(title, { value, action, text = "" }) {
  const input = value === undefined ? null : h("input", { value, "aria-label": title, maxlength: 80 });
  const dialog = h("dialog", { "aria-label": title },
    h("form", { method: "dialog" }, h("h2", {}, title), text && h("p", {}, text), input,
      h("div", { class: "actions" }, h("button", { value: "", formnovalidate: true }, "Cancel"),
        h("button", { class: "primary", value: "yes" }, action))));
  // Enter in the field presses the first button of the form, which would cancel.
  input?.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); dialog.close("yes"); }
  });
  document.body.append(dialog);
  dialog.showModal();
  input?.select();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    dialog.remove();
    resolve(dialog.returnValue === "yes" ? (input ? input.value : true) : null);
  }));
}
