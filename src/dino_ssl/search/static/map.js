// A map of points: zoom, pan, hover, lasso. Every redraw writes all points into one pixel buffer, in one pass.

const COLORS = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#7fb2f0", "#c2b03a"];
const MAX_IMAGES = 150; // if so few points are visible, they are drawn as images
const IMAGE_SIDE = 56, HIT_DISTANCE = 14, // in CSS pixels
  CLICK_DISTANCE = 4, PAN_STEP = 60, MAX_ZOOM = 2000;
const MANY = 20000, MAX_PIXELS = 2e6; // of the canvas with many points: more pixels are slow to copy
const DIMMED = 40; // opacity of points outside of a selection, of 255

/** Return the color of group `index` of `count`, as [r, g, b]; gray for points of no group, with a larger index. */
export function groupColor(index, count) {
  if (index >= count) return [138, 138, 150];
  if (count <= COLORS.length) return [1, 3, 5].map((at) => parseInt(COLORS[index].slice(at, at + 2), 16));
  const hue = (index * 222.492) % 360, light = 0.5 + 0.08 * ((index % 3) - 1); // multiples of the golden ratio
  return [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (light - 0.65 * Math.min(light, 1 - light) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/**
 * Draw points on a canvas and let a person explore them.
 *
 * data: {x, y: numbers per point in any unit, group: number of each point's group, groups: number of groups,
 * thumbnail: (point) => URL or null}. callbacks: {onHover(point or -1, x, y), onSelect(Int32Array of points)}.
 * Returns {setGroups(group, groups), select(points), selection(), fit(), zoom(factor), setLasso(on), draw(), destroy()};
 * draw() returns its time in milliseconds.
 */
export function createMap(canvas, data, callbacks = {}) {
  const count = data.x.length, x = Float32Array.from(data.x), y = Float32Array.from(data.y);
  const selected = new Uint8Array(count), images = new Map(), pointers = new Map();
  const context = canvas.getContext("2d"), abort = new AbortController();
  const edge = bounds(x, y), order = drawingOrder(x, y, edge);
  const sortedX = x.map((_, at) => x[order[at]]), sortedY = y.map((_, at) => y[order[at]]);
  let group, colors, numSelected = 0, hovered = -1, lasso = null, lassoMode = false, pending = 0, moved = 0;
  let ratio = 1, width = 1, height = 1, pixels = null, buffer = null, showsImages = false; // width in CSS pixels
  let scale = 1, originX = 0, originY = 0, fitted = 1; // a point is drawn at origin + scale * (x, y)

  function setGroups(values, groups) {
    group = Uint16Array.from(values, (value) => Math.min(value, groups)); // larger numbers: of no group
    colors = new Int32Array(groups + 1);
    for (let i = 0; i <= groups; i++) {
      const [r, g, b] = groupColor(i, groups);
      colors[i] = (b << 16) | (g << 8) | r; // the bytes of a pixel are red, green, blue, opacity
    }
    redraw();
  }

  function fit() {
    const margin = Math.min(56, width / 8, height / 8); // below the buttons of a page
    scale = fitted = Math.min((width - 2 * margin) / edge.width, (height - 2 * margin) / edge.height);
    originX = width / 2 - scale * (edge.left + edge.width / 2);
    originY = height / 2 - scale * (edge.top + edge.height / 2);
    redraw();
  }

  function zoom(factor, atX = width / 2, atY = height / 2) {
    factor = Math.min(Math.max(scale * factor, fitted / 4), fitted * MAX_ZOOM) / scale;
    originX = atX - factor * (atX - originX);
    originY = atY - factor * (atY - originY);
    scale *= factor;
    redraw();
  }

  function pan(dx, dy) {
    originX += dx;
    originY += dy;
    redraw();
  }

  function resize() {
    const first = buffer === null, centerX = width / 2, centerY = height / 2;
    width = Math.max(canvas.clientWidth, 1);
    height = Math.max(canvas.clientHeight, 1);
    ratio = window.devicePixelRatio || 1;
    if (count > MANY) ratio = Math.min(ratio, Math.max(1, Math.sqrt(MAX_PIXELS / (width * height))));
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    pixels = context.createImageData(canvas.width, canvas.height);
    buffer = new Int32Array(pixels.data.buffer);
    if (first || scale === fitted) fit();
    else pan(width / 2 - centerX, height / 2 - centerY);
  }

  /** Return the pixels of a disc as offsets in the buffer, and the opacity of each: 255 inside, less at the edge. */
  function disc(radius, stride) {
    const reach = Math.ceil(radius), offsets = [], opacity = [];
    for (let dy = -reach; dy <= reach; dy++)
      for (let dx = -reach; dx <= reach; dx++) {
        const cover = Math.min(Math.max(radius + 0.5 - Math.hypot(dx, dy), 0), 1);
        if (cover > 0.1) offsets.push(dy * stride + dx), opacity.push(Math.round(255 * cover));
      }
    return { reach, offsets: Int32Array.from(offsets), opacity: Uint8Array.from(opacity) };
  }

  function draw() {
    const start = performance.now(), stride = canvas.width, visible = [];
    const growth = Math.min((scale / fitted) ** 0.3, 3), base = Math.min(Math.max(130 / Math.sqrt(count), 0.9), 4.5);
    const { reach, offsets, opacity } = disc(base * growth * ratio, stride), size = offsets.length;
    const zoom = scale * ratio, shiftX = originX * ratio, shiftY = originY * ratio;
    const right = stride - reach, bottom = canvas.height - reach;
    const canvasPixels = buffer, groups = group, palette = colors; // constants, which the compiler keeps in registers
    canvasPixels.fill(0);
    for (let at = 0; at < count; at++) {
      const px = (shiftX + zoom * sortedX[at]) | 0, py = (shiftY + zoom * sortedY[at]) | 0;
      if (px < reach || py < reach || px >= right || py >= bottom) continue;
      const i = order[at], color = palette[groups[i]], center = py * stride + px;
      if (visible.length <= MAX_IMAGES) visible.push(i);
      const dimmed = numSelected > 0 && selected[i] === 0; // these stay below all others
      for (let k = 0; k < size; k++) {
        const pixel = center + offsets[k], alpha = opacity[k];
        if (dimmed) {
          if (canvasPixels[pixel] === 0) canvasPixels[pixel] = (((alpha * DIMMED) >> 8) << 24) | color;
        } else if (alpha === 255 || alpha > canvasPixels[pixel] >>> 24) canvasPixels[pixel] = (alpha << 24) | color;
      }
    }
    context.putImageData(pixels, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    showsImages = Boolean(data.thumbnail) && visible.length <= MAX_IMAGES;
    if (showsImages) visible.forEach(drawImage);
    if (hovered >= 0) ring(hovered, base * growth + 4);
    if (lasso) outline(lasso);
    context.setTransform(1, 0, 0, 1, 0, 0);
    return performance.now() - start;
  }

  function drawImage(point) {
    let image = images.get(point);
    if (!image) {
      const url = data.thumbnail(point);
      if (!url) return;
      image = new Image();
      images.set(point, image);
      image.onload = redraw;
      image.src = url;
    }
    if (!image.complete || !image.naturalWidth) return;
    const shrink = IMAGE_SIDE / Math.max(image.naturalWidth, image.naturalHeight);
    const w = shrink * image.naturalWidth, h = shrink * image.naturalHeight;
    context.globalAlpha = numSelected && !selected[point] ? 0.3 : 1;
    context.fillStyle = css(point);
    context.fillRect(screenX(point) - w / 2 - 2, screenY(point) - h / 2 - 2, w + 4, h + 4);
    context.drawImage(image, screenX(point) - w / 2, screenY(point) - h / 2, w, h);
    context.globalAlpha = 1;
  }

  function ring(point, radius) {
    context.beginPath();
    context.arc(screenX(point), screenY(point), radius, 0, 2 * Math.PI);
    context.lineWidth = 2;
    context.strokeStyle = getComputedStyle(canvas).color;
    context.stroke();
  }

  function outline(polygon) {
    context.beginPath();
    polygon.forEach(([px, py]) => context.lineTo(px, py));
    context.closePath();
    context.lineWidth = 1.5;
    context.strokeStyle = getComputedStyle(canvas).color;
    context.stroke();
    context.globalAlpha = 0.1;
    context.fillStyle = getComputedStyle(canvas).color;
    context.fill();
    context.globalAlpha = 1;
  }

  const screenX = (point) => originX + scale * x[point], screenY = (point) => originY + scale * y[point];
  const css = (point) => `#${[0, 8, 16].map((s) => ((colors[group[point]] >> s) & 255).toString(16).padStart(2, "0")).join("")}`;
  const redraw = () => (pending ||= requestAnimationFrame(() => ((pending = 0), draw())));
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  function nearest(atX, atY, most = showsImages ? IMAGE_SIDE / 2 : HIT_DISTANCE) {
    let best = -1, least = most * most;
    for (let i = 0; i < count; i++) {
      const distance = (screenX(i) - atX) ** 2 + (screenY(i) - atY) ** 2;
      if (distance < least) (least = distance), (best = i);
    }
    return best;
  }

  function hover(point) {
    if (point === hovered) return;
    hovered = point;
    redraw();
    callbacks.onHover?.(point, point < 0 ? 0 : screenX(point), point < 0 ? 0 : screenY(point));
  }

  function select(points) {
    selected.fill(0);
    for (const point of points) selected[point] = 1;
    numSelected = selected.reduce((sum, value) => sum + value, 0);
    redraw();
    callbacks.onSelect?.(selection());
  }

  function selection() {
    const points = new Int32Array(numSelected);
    for (let i = 0, at = 0; i < count; i++) if (selected[i]) points[at++] = i;
    return points;
  }

  const toggle = (point) => select(selected[point] ? selection().filter((i) => i !== point) : [...selection(), point]);

  /** Select the points inside of a polygon; with `add`, in addition to those selected before. */
  function selectInside(polygon, add) {
    const box = bounds(...[0, 1].map((axis) => polygon.map((corner) => corner[axis])));
    const points = add ? [...selection()] : [];
    for (let i = 0; i < count; i++) {
      const px = screenX(i), py = screenY(i);
      if (px < box.left || py < box.top || px > box.left + box.width || py > box.top + box.height) continue;
      let inside = false;
      for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
        const [ax, ay] = polygon[a], [bx, by] = polygon[b];
        if (ay > py !== by > py && px < ((bx - ax) * (py - ay)) / (by - ay) + ax) inside = !inside;
      }
      if (inside) points.push(i);
    }
    select(points);
  }

  // -- pointers and keys: one pointer pans or draws the lasso, two zoom -------------------------------------------

  const on = (name, handler) => canvas.addEventListener(name, handler, { signal: abort.signal, passive: false });
  on("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    moved = 0;
    lasso = pointers.size === 1 && (lassoMode || event.shiftKey) ? [place(event)] : null;
  });
  on("pointermove", (event) => {
    const now = place(event), before = pointers.get(event.pointerId);
    if (!before) return hover(nearest(...now));
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, now);
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (other) {
      const middle = [0, 1].map((axis) => (now[axis] + other[axis]) / 2);
      const spread = (place) => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
      zoom(spread(now) / spread(before), ...middle);
      pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    } else if (lasso) lasso.push(now), redraw();
    else pan(now[0] - before[0], now[1] - before[1]);
  });
  const release = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    const polygon = lasso, point = nearest(...place(event));
    lasso = null;
    redraw();
    if (event.type === "pointercancel" || pointers.size) return;
    if (moved <= CLICK_DISTANCE) return hover(point), point >= 0 ? toggle(point) : undefined;
    if (polygon) selectInside(polygon, event.ctrlKey || event.metaKey);
  };
  on("pointerup", release);
  on("pointercancel", release);
  on("pointerleave", (event) => event.pointerType === "mouse" && !pointers.size && hover(-1));
  on("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode ? 20 : 1;
    zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.002)), ...place(event));
  });
  const keys = {
    ArrowLeft: () => pan(PAN_STEP, 0), ArrowRight: () => pan(-PAN_STEP, 0),
    ArrowUp: () => pan(0, PAN_STEP), ArrowDown: () => pan(0, -PAN_STEP),
    "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: fit,
    " ": () => hovered >= 0 && toggle(hovered), Escape: () => select([]),
  };
  on("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
    if (event.key !== " " && event.key !== "Escape") hover(nearest(width / 2, height / 2, Math.max(width, height)));
  });

  setGroups(data.group, data.groups);
  const observer = new ResizeObserver(resize);
  observer.observe(canvas);
  resize();
  return {
    setGroups, select, selection, fit, zoom, draw,
    setLasso: (enabled) => (lassoMode = enabled),
    destroy: () => (abort.abort(), observer.disconnect(), cancelAnimationFrame(pending)),
  };
}

/** Return the points in bands from top to bottom, each from left to right: neighbors write to nearby memory. */
function drawingOrder(x, y, edge) {
  const keys = Float64Array.from(x, (value, i) => {
    const band = Math.floor((255 * (y[i] - edge.top)) / edge.height), column = (value - edge.left) / edge.width;
    return (band * 65536 + Math.floor(65535 * column)) * 2 ** 24 + i;
  });
  return Uint32Array.from(keys.sort(), (key) => key % 2 ** 24);
}

function bounds(x, y) {
  let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
  for (let i = 0; i < x.length; i++) {
    (left = Math.min(left, x[i])), (right = Math.max(right, x[i]));
    (top = Math.min(top, y[i])), (bottom = Math.max(bottom, y[i]));
  }
  return { left, top, width: right - left || 1, height: bottom - top || 1 };
}
