// Draws what page.js shows: the page of text and its attention, the answer, the chart, and small pictures of all heads.
"use strict";

// The colours of no weight and of the largest, in OKLab, where equal steps look equal.
const HEAT = {
  light: [[1, 0, 0], [0.9, 0.035, 0.11]],
  dark: [[0.18, 0, 0], [0.37, 0.065, 0.075]],
};
const OUTLINED = 0.05; // the weight from which a character is outlined
const MARGIN = 44; // of the chart, left and right
const dark = matchMedia("(prefers-color-scheme: dark)");
const manyActions = actions.length > 8;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw() {
  drawPage(element("page"), pageOf(current()));
  drawHeat();
  drawAnswer();
  drawChange();
  drawChart();
  drawHeads();
  describeCell();
  followBall();
}

// Show the text of a page, in spans of one colour. Lines that have not changed are left alone.
function drawPage(pre, page) {
  const text = textOf(page);
  while (pre.children.length < game.rows) pre.append(document.createElement("span"));
  for (let row = 0; row < game.rows; row++) {
    const line = pre.children[row];
    const now = text.slice(row * game.columns, row * game.columns + WIDTH);
    if (line.dataset.text === now) continue;
    line.dataset.text = now;
    line.replaceChildren(...partsOf(now, row).map(({ text, name, colour }) => {
      const span = document.createElement("span");
      span.textContent = text;
      span.className = name ?? "";
      if (colour) span.style.setProperty("--own", colour);
      return span;
    }), "\n");
  }
}

function prepare(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  const context = canvas.getContext("2d");
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  context.scale(scale, scale);
  return context;
}

// Return how hot a weight is, from 0 to 1: its logarithm, and 0 where it is the mean of all weights or less.
const level = (weight) => (weight * T > 1 ? Math.min(1, Math.log(weight * T) / Math.log(T)) : 0);

function colour(at) {
  const [low, high] = HEAT[dark.matches ? "dark" : "light"];
  return `oklab(${low.map((value, i) => (value + at * (high[i] - value)).toFixed(4)).join(" ")})`;
}

// Return the weights (T,) of the head that is shown, or the mean of all.
function weightsOf(head) {
  const { attention } = answer;
  if (head !== MEAN) return attention[head];
  return attention[0].map((_, t) => attention.reduce((sum, weights) => sum + weights[t], 0) / attention.length);
}

function sizes() {
  const box = element("page").getBoundingClientRect();
  return { width: box.width, height: box.height, w: box.width / WIDTH, h: box.height / game.rows };
}

function drawHeat() {
  const { width, height, w, h } = sizes();
  const context = prepare(element("heat"), width, height);
  const weights = weightsOf(shown.head);
  const marked = [];
  for (let t = 0; t < T; t++) {
    const [row, column] = [Math.floor(t / game.columns), t % game.columns];
    const weight = weights[t];
    if (column === WIDTH || weight * T <= 1) continue;
    context.fillStyle = colour(level(weight));
    context.fillRect(column * w, row * h, w + 0.5, h + 0.5);
    if (weight >= OUTLINED) marked.push([row, column, weight]);
  }
  context.strokeStyle = style("--ink");
  for (const [row, column, weight] of marked) {
    context.lineWidth = Math.min(weight >= 0.25 ? 2 : 1, w / 5); // on a small screen it must not hide the character
    context.strokeRect(column * w + 0.5, row * h + 0.5, w - 1, h - 1);
  }
  drawOver(context, w, h);
  placeCaption(largest(weights), w, h);
  if (cursor) {
    context.setLineDash([2, 2]);
    context.lineWidth = 2;
    context.strokeStyle = style("--accent");
    context.strokeRect(cursor.column * w, cursor.row * h, w, h);
  }
}

function drawAnswer() {
  const { action, hand, by = `${from} ` } = line[shown.frame]; // a recording has all heads
  const taken = action !== null && action >= 0 && !hand && by === reader() ? action : largest(answer.probabilities);
  actions.forEach((name, i) => {
    const row = element("actions").rows[i];
    const [label, bar, number] = row.cells;
    row.className = i === taken ? "chosen" : "";
    label.textContent = (i === taken ? "▶ " : "") + name;
    bar.firstChild.value = answer.probabilities[i];
    number.textContent = answer.probabilities[i].toFixed(3);
    if (i === taken && manyActions) showRow(row);
  });
  element("value").textContent = answer.value.toFixed(3);
}

// Scroll a row of the long list of actions into view, and nothing else.
function showRow({ offsetTop: top, offsetHeight: height }) {
  const list = element("answers");
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
}

// Show along the page's edges how probable it is, by the model, that a row or column changes next, with a dot where it
// did change.
function drawChange() {
  const { width, height, w, h } = sizes();
  const goesOn = line[shown.frame].action >= 0 && line[shown.frame].action !== null && !line[shown.frame + 1]?.edited;
  const next = goesOn && line[shown.frame + 1] ? pageOf(line[shown.frame + 1].state) : null;
  const page = pageOf(current());
  const did = { row: new Set(), column: new Set() };
  if (next) for (let t = 0; t < T; t++) {
    if (page[t] === next[t]) continue;
    did.row.add(Math.floor(t / game.columns));
    did.column.add(t % game.columns);
  }
  const predicted = {
    row: answer.changes.slice(0, game.rows),
    column: answer.changes.slice(game.rows, game.rows + WIDTH),
  };
  const strips = { row: ["rows", 1.6 * w, height], column: ["columns", width, 1.1 * h] };
  for (const [what, [id, stripWidth, stripHeight]] of Object.entries(strips)) {
    const context = prepare(element(id), stripWidth, stripHeight);
    const ink = style("--ink");
    predicted[what].forEach((probability, i) => {
      const box = what === "row" ? [2, i * h, stripWidth - 2, h] : [i * w, 2, w, stripHeight - 2];
      context.fillStyle = colour(probability);
      context.fillRect(...box);
      if (!did[what].has(i)) return;
      context.fillStyle = ink;
      context.beginPath();
      context.arc(box[0] + box[2] / 2, box[1] + box[3] / 2, Math.max(1.2, w / 4), 0, 7);
      context.fill();
    });
    element(id).style[what === "row" ? "left" : "top"] = (what === "row" ? width : height) + "px";
  }
  const list = (numbers) => (numbers.length > 14 ? `${numbers.length} of them` : numbers.join(", ")) || "none";
  const likely = (what) => list([...predicted[what].keys()].filter((i) => predicted[what][i] >= 0.5));
  let text = "Predicted to change next (along the edges of the page): ";
  text += `rows ${likely("row")}; columns ${likely("column")}.`;
  const columns = [...did.column].sort((a, b) => a - b);
  if (next) text += ` Changed (dots): rows ${list([...did.row])}; columns ${list(columns)}.`;
  element("prediction").textContent = text;
}

// The chart: the score and the value over the line, and faintly those of the recording from where the line leaves it.

// Return how many frames the chart is wide. It is not made anew with every step that is played on.
const framesOfChart = () =>
  Math.max(recordings[from].length, branch < Infinity ? 100 * Math.ceil(line.length / 100) : 2);
const pixelsPerFrame = () => (element("chart").clientWidth - 2 * MARGIN) / (framesOfChart() - 1);
const frameAt = (x) => Math.round((x - MARGIN) / pixelsPerFrame());

function drawChart() {
  const canvas = element("chart");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const context = prepare(canvas, width, height);
  canvas.style.width = "100%";
  const recorded = recordings[from];
  const wide = pixelsPerFrame();
  const placeOf = (i) => MARGIN + wide * i;
  const every = Math.max(1, Math.floor(1 / wide)); // one point for each pixel is enough
  const [top, bottom] = [16, height - 4];
  context.font = "12px system-ui, sans-serif";
  if (branch < Infinity) {
    context.fillStyle = style("--panel");
    context.fillRect(placeOf(branch), top, placeOf(line.length - 1) - placeOf(branch), bottom - top);
    context.fillStyle = style("--faint");
    const left = Math.min(placeOf(branch) + 3, width - MARGIN - 80);
    context.fillText("not recorded", Math.max(MARGIN + 3, left), 11);
  }
  const curves = [ // the name, the field of a frame, the variable of the colour, dashes, where the labels begin
    [SCORE_NAME, "score", "--accent", [], 4],
    ["value", "value", "--paddle", [5, 3], width - MARGIN + 4],
  ];
  for (const [name, field, variable, dash, labelAt] of curves) {
    const known = [...recorded, ...line.slice(branch)].map((frame) => frame[field]).filter((x) => x !== undefined);
    const low = known.reduce((a, b) => Math.min(a, b));
    const high = known.reduce((a, b) => Math.max(a, b));
    const range = high - low || 1;
    const up = (value) => bottom - ((bottom - top) * (value - low)) / range;
    const draw = (frames, first, opacity) => {
      context.globalAlpha = opacity;
      context.beginPath();
      for (let i = 0; i < frames.length; i += every) {
        if (frames[i][field] !== undefined) context.lineTo(placeOf(first + i), up(frames[i][field]));
      }
      context.stroke();
      context.globalAlpha = 1;
    };
    context.strokeStyle = context.fillStyle = style(variable);
    context.setLineDash(dash);
    context.lineWidth = 1.5;
    draw(line, 0, 1);
    if (branch < Infinity) draw(recorded.slice(branch), branch, 0.35);
    context.fillText(name, labelAt, 11);
    const digits = range < 1 ? 2 : 1;
    for (const value of new Set([low, high])) {
      const below = value === high && high > low ? 12 : 0; // pixels
      context.fillText(Number.isInteger(value) ? value : value.toFixed(digits), labelAt, up(value) + below);
    }
  }
  context.setLineDash([]);
  context.strokeStyle = style("--ink");
  context.lineWidth = 1;
  context.strokeRect(placeOf(shown.frame), top, 0, bottom - top);
  const left = branch < Infinity ? `; the recording is left at step ${branch}` : "";
  const now = `${SCORE_NAME} ${line[shown.frame].score}, value ${answer.value.toFixed(2)}`;
  canvas.setAttribute("aria-label", `${SCORE_NAME} and value over ${line.length - 1} steps${left}; now ${now}`);
}

function drawScale() {
  const canvas = element("scale");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const context = prepare(canvas, width, height);
  for (let i = 0; i < width; i++) {
    context.fillStyle = colour(i / width);
    context.fillRect(i, 0, 1, height / 2);
  }
  canvas.style.width = "100%";
  context.fillStyle = style("--ink");
  context.font = "12px system-ui, sans-serif";
  for (const weight of [0.001, 0.01, 0.1]) {
    if (weight * T <= 1.5) continue; // on a small page, where even the mean is no less
    context.fillRect(level(weight) * width, 0, 1, height / 2);
    context.fillText(`${100 * weight} %`, level(weight) * width - 10, height - 4);
  }
}

// The heads: for each a small picture of the page, what it looks at, and a switch

function describeHeads() {
  const { shares } = stages[shown.stage];
  const mean = shares[0].map((_, i) => shares.reduce((sum, head) => sum + head[i], 0) / shares.length);
  const tiles = ORDER.map((head) => headTile(head, shares[head]));
  element("heads").replaceChildren(headTile(MEAN, mean), ...tiles);
}

// Make the tile of a head. looks: the share of its attention that each thing gets.
function headTile(head, looks) {
  const [thing, share] = stages[shown.stage].names[head] ?? [];
  const tile = document.createElement("div");
  const button = document.createElement("button");
  const label = document.createElement("span");
  button.append(document.createElement("canvas"), label);
  label.textContent = head === MEAN ? "mean of all" : `${head} ${thing}`;
  button.onclick = () => choose({ head });
  button.dataset.head = head;
  button.title = head === MEAN ? "The mean of all heads" : `Head ${head}: ${thing} ${percent(share)}`;
  const most = things.map((thing, i) => [looks[i], thing]).filter(([part]) => part >= 0.005);
  most.sort((a, b) => b[0] - a[0]);
  button.dataset.shares = most.map(([part, thing]) => `${thing} ${percent(part)}`).join(", ");
  button.setAttribute("role", "radio");
  tile.append(button);
  if (head !== MEAN) tile.append(headSwitch(head));
  return tile;
}

function headSwitch(head) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  const score = shown.stage === stages.length - 1 ? data.without[head] : undefined; // measured with the model itself
  box.type = "checkbox";
  box.checked = !silent.has(head);
  box.dataset.switch = head;
  box.setAttribute("aria-label", `head ${head} takes part`);
  box.onchange = () => silence(head, !box.checked);
  label.append(box, score === undefined ? "on" : `${score} if off`);
  label.title = `Leave out what head ${head} says`
    + (score === undefined ? "" : `. Without it the model scores ${score} points`);
  return label;
}

function markChosen() {
  for (const button of element("heads").querySelectorAll("button")) {
    const chosen = button.dataset.head === String(shown.head);
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
    const who = shown.head === MEAN ? "The mean of all heads" : `Head ${shown.head}`;
    if (chosen) element("shares").textContent = `${who} over the recording: ${button.dataset.shares}.`;
  }
  for (const box of element("heads").querySelectorAll("input")) {
    box.checked = !silent.has(Number(box.dataset.switch));
    box.closest("div").classList.toggle("silent", !box.checked);
  }
  element("stage").value = shown.stage;
  element("stage").setAttribute("aria-valuetext", stages[shown.stage].label);
  element("stage-name").textContent = stages[shown.stage].label;
}

const TILE = [2, 3]; // the size of a character in the small picture of a head, in dots of the canvas
let tilesDrawn = 0; // when, because small pictures need not change with every step while time goes on

function drawHeads() {
  if (playing && performance.now() - tilesDrawn < 100) return;
  tilesDrawn = performance.now();
  const [w, h] = TILE;
  const page = pageOf(current());
  const space = game.characters.indexOf(" ");
  const [faint, ink] = [style("--line"), style("--ink")];
  const plain = document.createElement("canvas");
  [plain.width, plain.height] = [WIDTH * w, game.rows * h];
  const paint = plain.getContext("2d");
  paint.fillStyle = faint;
  paint.globalAlpha = 0.5;
  for (let t = 0; t < T; t++) {
    const column = t % game.columns;
    if (column < WIDTH && page[t] !== space) paint.fillRect(column * w, Math.floor(t / game.columns) * h, w, h);
  }
  for (const button of element("heads").querySelectorAll("button")) {
    const head = button.dataset.head === MEAN ? MEAN : Number(button.dataset.head);
    const canvas = button.firstChild;
    [canvas.width, canvas.height] = [plain.width, plain.height];
    const context = canvas.getContext("2d");
    context.drawImage(plain, 0, 0);
    weightsOf(head).forEach((weight, t) => {
      const column = t % game.columns;
      if (column === WIDTH || weight * T <= 1) return;
      const marked = weight >= OUTLINED;
      context.fillStyle = marked ? ink : style("--heat");
      context.globalAlpha = marked ? 1 : level(weight);
      const size = marked ? 2 : 0; // dots more on each side, so that one character can be seen
      context.fillRect(column * w - size, Math.floor(t / game.columns) * h - size, w + 2 * size, h + 2 * size);
    });
  }
}

// The cell under the cursor

function describeCell() {
  if (!cursor) return (element("cell").textContent = "Point at a character to see what each head gives it.");
  const t = cursor.row * game.columns + cursor.column;
  const character = game.characters[pageOf(current())[t]];
  const heads = answer.attention.map((head, i) => [head[t], i]).filter(([weight]) => weight >= 0.0005);
  heads.sort((a, b) => b[0] - a[0]);
  const weights = heads.map(([weight, i]) => `head ${i} ${percent(weight)}`).join(", ");
  const mean = answer.attention.reduce((sum, head) => sum + head[t], 0) / answer.attention.length;
  let text = `Row ${cursor.row}, column ${cursor.column}: ${character === " " ? "empty" : character}. `;
  text += weights ? `Weights: ${weights}; ` : "Every head gives it less than 0.05 %; ";
  text += `mean ${(100 * mean).toFixed(2)} %.`;
  element("cell").textContent = text + describedToo(cursor);
}

// Sizes

// Let the page fill the width of the board, but with characters that are not too large, and leave room on the screen for
// what belongs to it.
function fit() {
  const view = element("view");
  const wide = matchMedia("(min-width: 62rem)").matches;
  const height = wide ? Math.max(240, innerHeight - OTHERS) / (1.25 * (game.rows + 1)) : Infinity;
  fitInto(view, element("board").clientWidth, Math.min(WIDTH < 45 ? 26 : 18, Math.max(6, 560 / game.rows), height));
  if (document.body.classList.contains("zoomed")) view.style.fontSize = `${ZOOMED}px`;
}

const OTHERS = 316; // pixels of a screen that what is above and below the page takes
const ZOOMED = 18; // pixels, the height of a character of a page that is scrolled

// Give an element the largest font with which it is not wider than some pixels.
function fitInto(view, room, most) {
  view.style.fontSize = "100px";
  const perPixel = view.getBoundingClientRect().width / 100;
  view.style.fontSize = Math.min(most, Math.floor((100 * room) / perPixel) / 100) + "px";
}

function zoom() {
  if (!element("zoom").offsetParent) return; // on a large screen
  hideCaptions();
  const zoomed = document.body.classList.toggle("zoomed");
  element("zoom").setAttribute("aria-pressed", zoomed);
  redraw();
}

// Keep the ball in sight while the page is zoomed, or the cursor while time stands still.
function followBall() {
  const followed = (!playing && cursor) || (LIVE && firstCell());
  if (!followed || !document.body.classList.contains("zoomed")) return;
  const { w, h } = sizes();
  const { row, column } = followed;
  const frame = element("frame");
  frame.scrollLeft = column * w - frame.clientWidth / 2;
  frame.scrollTop = row * h - frame.clientHeight / 2;
}

function redraw() {
  fit();
  drawScale();
  update(remark);
}

// The three captions that are there at first

const captions = () => document.querySelectorAll(".caption");

function showCaptions() {
  for (const caption of captions()) caption.hidden = false;
  element("caption-text").textContent = captionOfHead();
}

// Let the caption of the head point to the character with the largest weight.
function placeCaption(t, w, h) {
  const [row, column] = [Math.floor(t / game.columns), t % game.columns];
  const { style } = element("caption-head");
  const onLeft = column > WIDTH / 2;
  style.left = onLeft ? "auto" : `${(column + 1.5) * w}px`;
  style.right = onLeft ? `${element("view").clientWidth - (column - 0.5) * w}px` : "auto";
  style.top = `${(row - 0.2) * h}px`;
}

// Hide the captions. Returns whether there were any.
function hideCaptions() {
  const there = [...captions()].some((caption) => !caption.hidden);
  for (const caption of captions()) caption.hidden = true;
  return there;
}

// Build what depends on the game and the model.
function build() {
  element("about").textContent = data.about;
  document.title = `What the model sees: ${data.name}`;
  element("page").style.width = `${WIDTH}ch`;
  element("answers").classList.toggle("many", manyActions);
  for (const name of actions) {
    const row = element("actions").insertRow();
    const meter = document.createElement("meter");
    row.insertCell();
    row.insertCell().append(meter);
    row.insertCell();
    meter.setAttribute("aria-label", `probability of ${name}`);
  }
  element("stages").hidden = stages.length < 2;
  for (const caption of captions()) caption.onclick = hideCaptions;
  element("stage-note").textContent = data.note;
}
