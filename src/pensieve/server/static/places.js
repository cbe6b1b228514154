/**
 * What a map character says, in words and in ink. Knows nothing of rows, pages or servers.
 *
 * Places differ three times over: by colour, by height (the further away a chunk lies, the lower its cell) and by
 * pattern; by letter as well where a cell is large enough. A cap above a cell says "shared".
 */

/** @typedef {{code: string, name: string, words: string, height: number}} Place */

/** @type {Place[]} height: of the row's strip, 0 to 1 */
export const PLACES = [
  { code: "g", name: "gpu", words: "on gpu", height: 1 },
  { code: "b", name: "gpu + lower", words: "on gpu, with a copy in a lower tier", height: 1 },
  { code: "c", name: "cpu", words: "in cpu memory", height: 0.75 },
  { code: "d", name: "disk", words: "on disk", height: 0.5 },
  { code: ".", name: "dropped", words: "dropped, to be computed again", height: 0.14 },
  { code: "*", name: "computing", words: "being computed", height: 1 },
  { code: ">", name: "coming in", words: "being swapped in", height: 1 },
];

const BY_CODE = new Map(PLACES.map((place) => [place.code, place]));
const UNKNOWN = { code: "?", name: "unknown", words: "in a place this page does not know", height: 0.5 };

/** @param {string} cell a map character, upper case = shared */
export function placeOf(cell) {
  return BY_CODE.get(cell.toLowerCase()) ?? UNKNOWN;
}

/** @param {string} cell */
export function isShared(cell) {
  return cell >= "A" && cell <= "Z";
}

/** Would a turn find all of it on the gpu (or on its way there)? */
export function isAllOnGpu(cells) {
  return !/[^gbGB*>]/.test(cells);
}

/** "40 chunks: 30 gpu, 8 cpu, 2 dropped, 4 of them shared" */
export function cellsSummary(cells) {
  const counts = new Map();
  let shared = 0;
  for (const cell of cells) {
    const name = placeOf(cell).name;
    counts.set(name, (counts.get(name) ?? 0) + 1);
    if (isShared(cell)) shared += 1;
  }
  const parts = [...PLACES, UNKNOWN].filter(({ name }) => counts.has(name)).map(({ name }) => `${counts.get(name)} ${name}`);
  const head = `${cells.length} chunk${cells.length === 1 ? "" : "s"}`;
  return [parts.length ? `${head}: ${parts.join(", ")}` : head, ...(shared ? [`${shared} of them shared`] : [])].join(", ");
}

/** One chunk in words. @param {{title: string, cells: string, tokens?: number}} row */
export function cellWords(row, index, chunkTokens) {
  const cell = row.cells[index];
  const start = index * chunkTokens;
  const stop = Math.min(start + chunkTokens, row.tokens > start ? row.tokens : start + chunkTokens);
  const shared = isShared(cell) ? ", shared with another conversation" : "";
  return `chunk ${index + 1} of ${row.cells.length}, tokens ${start}–${stop}: ${placeOf(cell).words}${shared}`;
}

/** The theme's colours as the canvas needs them: custom properties do not resolve light-dark() by themselves. */
export function readInks() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const ink = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const inks = {
    g: ink("gpu"), b: ink("gpu"), c: ink("cpu"), d: ink("disk"), ".": ink("dropped"), "*": ink("computing"), ">": ink("incoming"), "?": ink("dropped"),
    lower: ink("both"), cap: ink("text"), mark: ink("cell-mark"), gpuMark: ink("gpu-mark"), pin: ink("text"), waiting: ink("line"), cursor: ink("text"),
  };
  probe.remove();
  return inks;
}

/**
 * A run of equal cells. In low strips, and under 3 px, they merge into one block; from 5 px on they are patterned, from 11 px lettered.
 * @param {CanvasRenderingContext2D} context
 * @param {number} count how many equal cells
 * @param {number} cellWidth px
 */
function drawRun(context, inks, cell, count, x, y, cellWidth, stripHeight) {
  const place = placeOf(cell);
  const height = Math.max(1, place.height * stripHeight);
  const top = y + stripHeight - height;
  const apart = cellWidth >= 3 && stripHeight >= 9;
  const width = apart ? cellWidth - 1 : cellWidth * count;
  const drawMark = !apart || cellWidth < 5 ? null : cellWidth >= 11 && stripHeight >= 14 ? drawLetter : drawPattern;
  for (let i = 0; i < (apart ? count : 1); i += 1) {
    const left = x + i * cellWidth;
    context.fillStyle = inks[place.code];
    context.fillRect(left, top, width, height);
    if (place.code === "b") {
      context.fillStyle = inks.lower;
      context.fillRect(left, y + stripHeight * 0.55, width, stripHeight * 0.45);
    }
    if (isShared(cell)) {
      context.fillStyle = inks.cap;
      context.fillRect(left, y, width, Math.max(1, stripHeight / 8));
    }
    drawMark?.(context, inks, cell, left, top, width, height);
  }
}

function drawPattern(context, inks, cell, left, top, width, height) {
  const [across, down] = [left + width / 2, top + height / 2];
  context.fillStyle = inks.mark;
  switch (placeOf(cell).code) {
    case "c":
      for (let line = top + 2; line < top + height - 1; line += 3) context.fillRect(left, line, width, 1);
      break;
    case "d":
      context.fillRect(across - 1, down - 1, 2, 2);
      break;
    case "*":
      context.fillRect(across - 1.5, down - 1.5, 3, 3);
      break;
    case ">":
      context.beginPath();
      context.moveTo(across - 1.5, down - 3);
      context.lineTo(across + 2, down);
      context.lineTo(across - 1.5, down + 3);
      context.fill();
      break;
    default: // plain
  }
}

function drawLetter(context, inks, cell, left, top, width, height) {
  const { code } = placeOf(cell);
  if (code === ".") return;
  context.fillStyle = code === "g" ? inks.gpuMark : inks.mark;
  context.font = `600 ${code === "*" ? 13 : code === "d" ? 8 : 9}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  context.fillText(cell, left + width / 2, top + height - (code === "*" ? 1 : code === "d" ? 1 : 2.5));
}

/** A whole row of cells as runs. */
export function drawStrip(context, inks, cells, x, y, cellWidth, stripHeight, from = 0, to = cells.length) {
  let start = from;
  while (start < to) {
    let stop = start + 1;
    while (stop < to && cells[stop] === cells[start]) stop += 1;
    drawRun(context, inks, cells[start], stop - start, x + start * cellWidth, y, cellWidth, stripHeight);
    start = stop;
  }
}

/** Size a canvas in CSS px and hand out a context that draws in them. */
export function prepareCanvas(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Fill the legend with the very ink of the map. */
export function drawLegend(list, inks) {
  const entries = [
    ...PLACES.map((place) => [place.code, place.name, place.words]),
    ["G", "shared", "upper case and a cap: also part of another conversation"],
    ["pin", "pinned", "underlined: kept by its owner, may move but is never dropped"],
  ];
  if (list.children.length === 0) {
    for (const [code, name, words] of entries) {
      const item = document.createElement("li");
      item.title = words;
      const canvas = document.createElement("canvas");
      canvas.setAttribute("aria-hidden", "true");
      canvas.dataset.code = code;
      item.append(canvas, name);
      list.append(item);
    }
  }
  for (const canvas of list.querySelectorAll("canvas")) {
    const context = prepareCanvas(canvas, 15, 18);
    const pinned = canvas.dataset.code === "pin";
    drawStrip(context, inks, pinned ? "g" : canvas.dataset.code, 0, 0, 14, 15);
    if (pinned) drawPinLine(context, inks, 0, 16, 13);
  }
}

export function drawPinLine(context, inks, x, y, width) {
  context.fillStyle = inks.pin;
  context.fillRect(x, y, width, 2);
}
