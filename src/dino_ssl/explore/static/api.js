// Requests to the server, the items of the index that were loaded, and messages between parts of the page.

export const events = new EventTarget();
export const emit = (name, detail) => events.dispatchEvent(new CustomEvent(name, { detail }));

export const store = { info: null, items: new Map(), filters: { folder: "", label: "", name: "" } };

async function request(path, { headers, ...options } = {}) {
  let answer;
  try { // rows are those of one version of the index, which the first request asks for
    answer = await fetch(path, { ...options, headers: { ...headers, ...(store.info && { "x-index-version": store.info.version }) } });
  } catch (error) {
    if (error.name !== "AbortError") emit("offline", "The server does not answer. Start dino explore again and open the address that it prints.");
    throw error;
  }
  if (answer.status === 401 || answer.status === 403 && !answer.headers.get("content-type")?.includes("json")) {
    emit("offline", "The server was started again. Open the new address that dino explore printed.");
    throw Object.assign(new Error("This page belongs to an earlier start of the server."), { status: answer.status });
  }
  if (answer.ok) {
    emit("online");
    return answer;
  }
  const { error, version } = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  emit(version ? "outdated" : "online", version); // the server names its version if that of the request is another one
  throw Object.assign(new Error(error), { status: answer.status });
}

const query = (parameters = {}) => {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== undefined && value !== null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

export const get = async (path, parameters, signal) => (await request(path + query(parameters), { signal })).json();
const getArray = (Kind) => async (path, parameters, signal) =>
  new Kind(await (await request(path + query(parameters), { signal })).arrayBuffer());
export const getRows = getArray(Uint32Array), getFloats = getArray(Float32Array), getShorts = getArray(Uint16Array);
export const post = async (path, data = {}, signal) => (await request(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(data), signal,
})).json();
export const upload = async (file) => (await request("/api/upload", { method: "POST", body: file })).json();

export const thumbnail = (row) => `/api/thumbnail/${row}?v=${store.info.version}`;

// Load the items of these rows that are missing; calls of the same moment are one request.
let wanted = new Set(), pending = null;
export function loadItems(rows) {
  for (const row of rows) if (!store.items.has(row)) wanted.add(row);
  if (!wanted.size) return Promise.resolve();
  pending ??= new Promise((resolve) => setTimeout(resolve)).then(async () => {
    const missing = [...wanted];
    wanted = new Set();
    pending = null;
    for (let start = 0; start < missing.length; start += 400) {
      const items = await get("/api/items", { rows: JSON.stringify(missing.slice(start, start + 400)) });
      for (const item of items) store.items.set(item.row, item);
    }
  });
  return pending;
}
