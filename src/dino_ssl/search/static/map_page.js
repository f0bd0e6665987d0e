// The page of `dino map`: what surrounds the map. It is inlined after map.js; the data are JSON in the document.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const numbers = (text) => new Uint16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const shown = (name) => name.replace(/[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
const thumbnail = (point) =>
  data.folder ? `${data.folder}/${String(data.rows[point]).padStart(7, "0")}.jpg` : data.thumbnails[point];
const MAX_LISTED = 200;

const colorings = data.colorings.map((coloring) => ({ ...coloring, values: numbers(coloring.values) }));
const describe = (point) => colorings.map(({ title, names, none, values }) => `${title} ${shown(names[values[point]] ?? none)}`).join(", ");
const map = createMap(
  find("map"),
  { x: numbers(data.x), y: numbers(data.y), group: colorings[0].values, groups: colorings[0].names.length,
    thumbnail },
  { onHover: showTip, onSelect: showSelection },
);
let selected = new Int32Array();

function element(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text) made.textContent = text;
  return made;
}

function picture(point) {
  const url = thumbnail(point);
  return url ? [element("img", "", { src: url, alt: "" })] : [];
}

function showTip(point, x, y) {
  const tip = find("tip");
  tip.hidden = point < 0;
  if (point < 0) return;
  tip.replaceChildren(...picture(point), element("b", shown(data.names[point])), element("span", describe(point)));
  const box = find("map");
  tip.style.left = `${Math.max(0, Math.min(x + 16, box.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(0, Math.min(y + 16, box.clientHeight - tip.offsetHeight - 8))}px`;
}

function showSelection(points) {
  selected = points;
  const number = points.length.toLocaleString("en");
  find("count").textContent = points.length ? `${number} selected` : "Nothing selected";
  for (const id of ["copy", "download", "clear"]) find(id).disabled = !points.length;
  const items = [...points.slice(0, MAX_LISTED)].map((point) => {
    const item = element("li");
    item.append(...picture(point), element("span", shown(data.names[point])));
    return item;
  });
  if (points.length > MAX_LISTED) items.push(element("li", `and ${(points.length - MAX_LISTED).toLocaleString("en")} more`));
  find("list").replaceChildren(...items);
}

function showLegend() {
  const { names, none, values } = colorings[find("coloring").value], counts = new Uint32Array(names.length + 1);
  for (const value of values) counts[Math.min(value, names.length)]++;
  map.setGroups(values, names.length);
  find("legend").replaceChildren(
    ...[...names, none].flatMap((name, index) => {
      if (!counts[index]) return [];
      const button = element("button", "", { type: "button", title: "Select these images" });
      const dot = element("i");
      dot.style.background = `rgb(${groupColor(index, names.length)})`;
      button.append(dot, element("span", shown(name)), element("small", counts[index].toLocaleString("en")));
      button.onclick = () => map.select(points((point) => Math.min(values[point], names.length) === index));
      return [button];
    }),
  );
}

const points = (test) => data.names.map((_, point) => point).filter(test);
const cell = (text) => `"${(/^[=+\-@]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

find("coloring").append(...colorings.map(({ title }, value) => element("option", title, { value })));
find("coloring").onchange = showLegend;
find("find").oninput = (event) => {
  const text = event.target.value.toLowerCase();
  map.select(text ? points((point) => data.names[point].toLowerCase().includes(text)) : []);
};
find("lasso").onclick = (event) => {
  const on = event.target.getAttribute("aria-pressed") !== "true";
  event.target.setAttribute("aria-pressed", on);
  map.setLasso(on);
};
find("in").onclick = () => map.zoom(1.6);
find("out").onclick = () => map.zoom(1 / 1.6);
find("fit").onclick = map.fit;
find("clear").onclick = () => ((find("find").value = ""), map.select([]));
find("copy").onclick = async () => {
  const text = [...selected].map((point) => data.names[point]).join("\n");
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission
    const area = element("textarea", "", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  find("count").textContent = `${selected.length.toLocaleString("en")} names copied`;
};
find("download").onclick = () => {
  const header = ["name", ...colorings.map(({ title }) => title)].map(cell).join(",");
  const rows = [...selected].map((point) =>
    [data.names[point], ...colorings.map(({ names, values }) => names[values[point]] ?? "")].map(cell).join(","));
  const url = URL.createObjectURL(new Blob([[header, ...rows, ""].join("\n")], { type: "text/csv" }));
  element("a", "", { href: url, download: "selection.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};
showLegend();
showSelection(selected);
