// Matrix: a row looks at its columns. It can be zoomed and moved.
// A sparse map shows block means, and the weights that are kept once it is near enough.

const LABELLED = 12,
  LARGEST_CELL = 34,
  LONGEST_LABEL = 84;

class Matrix {
  constructor(box, map, place, act) {
    Object.assign(this, { map, place, act, cell: null, current: null, found: [new Set(), new Set()] });
    this.tokens = [0, 1].map((end) => tokensOf(place, end));
    this.canvas = el("canvas", {
      tabindex: "0",
      role: "application",
      "aria-roledescription": "matrix",
      "aria-describedby": "hint",
      "aria-label": `${map.rows} tokens that look, by ${map.columns} that are looked at`,
    });
    const button = (name, label, action) =>
      el("button", { type: "button", "aria-label": label, title: label, onclick: action }, name);
    this.tools = el(
      "div",
      { class: "tools" },
      button("−", "Smaller", () => this.zoom(1 / 1.5)),
      button("+", "Larger", () => this.zoom(1.5)),
      button("All", "The whole matrix", () => this.whole()),
      (this.readout = el("output", {})),
    );
    box.replaceChildren(this.tools, this.canvas);
    this.box = box;
    this.listen();
    this.whole();
  }

  whole() {
    const width = this.box.clientWidth,
      height = Math.max(320, Math.min(innerHeight * 0.8, 900));
    const { rows, columns } = this.map;
    this.most = { width, height };
    const bare = Math.min((width - 2) / columns, (height - 2) / rows);
    this.labels = this.tokens.map((tokens) => labelWidth(tokens));
    const labelled = Math.min((width - this.labels[0]) / columns, (height - this.labels[1]) / rows);
    this.fit = Math.min(labelled >= LABELLED ? labelled : bare, LARGEST_CELL);
    Object.assign(this, { size: this.fit, left: 0, top: 0 });
    this.paint();
    this.redraw();
  }

  // By a factor, around a point of the canvas (its middle if none is given).
  zoom(factor, x = this.most.width / 2, y = this.most.height / 2) {
    const [column, row] = [this.left + (x - this.side) / this.size, this.top + (y - this.head) / this.size];
    this.size = Math.min(Math.max(this.size * factor, this.fit), LARGEST_CELL);
    this.measure();
    this.left = column - (x - this.side) / this.size;
    this.top = row - (y - this.head) / this.size;
    this.redraw();
  }

  // Room for labels, where cells are large enough for them: `side` of those that look, `head` above those looked at.
  measure() {
    [this.side, this.head] = this.size >= LABELLED ? this.labels : [1, 1];
  }

  show({ current, found, chosen, follow }) {
    Object.assign(this, { current, found });
    if (!current) this.cell = null;
    if (follow && chosen)
      this.into(chosen.end ? null : chosen.index, chosen.end ? chosen.index : (this.cell?.column ?? null));
    this.redraw();
  }

  // Moves so that a row and a column are in view.
  into(row, column) {
    const { size, side, head, most } = this,
      [across, down] = [(most.width - side) / size, (most.height - head) / size];
    if (row !== null && (row < this.top || row + 1 > this.top + down)) this.top = row - down / 2;
    if (column !== null && (column < this.left || column + 1 > this.left + across)) this.left = column - across / 2;
  }

  paint() {
    const { levels, rows, columns } = this.map.picture;
    this.image = painted(levels, rows, columns);
    this.dark = isDark();
  }

  redraw() {
    if (this.dark !== isDark()) this.paint();
    const { map, size, most } = this;
    this.measure();
    const { side, head } = this;
    const across = Math.min(map.columns, (most.width - side - 1) / size),
      down = Math.min(map.rows, (most.height - head - 1) / size);
    this.left = Math.min(Math.max(this.left, 0), map.columns - across);
    this.top = Math.min(Math.max(this.top, 0), map.rows - down);
    const width = across * size,
      height = down * size,
      { left, top } = this,
      block = map.picture.size;
    const context = sharp(this.canvas, side + width + 1, head + height + 1);
    context.imageSmoothingEnabled = size * block < 1;
    context.drawImage(this.image, left / block, top / block, across / block, down / block, side, head, width, height);
    context.save();
    context.beginPath();
    context.rect(side, head, width, height);
    context.clip();
    if (map.sparse && size >= 2) this.drawKept(context);
    if (isCross(this.place) && size >= 8) this.drawAlignment(context);
    this.drawCross(context, width, height);
    context.restore();
    context.strokeStyle = inkOf("--rule");
    context.strokeRect(side - 0.5, head - 0.5, width + 1, height + 1);
    if (side > 1) this.drawLabels(context, across, down);
    this.canvas.classList.toggle("moves", size > this.fit * 1.001);
  }

  x(column) {
    return this.side + (column - this.left) * this.size;
  }
  y(row) {
    return this.head + (row - this.top) * this.size;
  }

  drawKept(context) {
    const { k, at, values } = this.map.largest(),
      last = Math.min(this.map.rows, Math.ceil(this.top + this.most.height / this.size));
    for (let i = Math.floor(this.top); i < last; i++) {
      for (let n = i * k; n < (i + 1) * k; n++) {
        context.fillStyle = palette().colour(values[n]);
        if (values[n]) context.fillRect(this.x(at[n]), this.y(i), this.size, this.size);
      }
    }
  }

  // A ring on the largest weight of each row: the path of an alignment.
  drawAlignment(context) {
    const { k, at, values } = this.map.largest(1);
    context.lineWidth = 2;
    context.strokeStyle = inkOf("--m1");
    for (let i = 0; i < this.map.rows; i++) {
      if (!values[i * k]) continue;
      context.beginPath();
      context.arc(this.x(at[i * k] + 0.5), this.y(i + 0.5), this.size * 0.36, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  drawCross(context, width, height) {
    const { current, side, head, size } = this;
    const row = this.cell?.row ?? (current && !current.end ? current.index : null);
    const column = this.cell?.column ?? (current?.end ? current.index : null);
    context.lineWidth = size < 4 ? 1 : 1.5;
    context.strokeStyle = inkOf("--m1");
    const space = size < 4 ? 2 : 0.5; // around, never over, what it points at
    if (row !== null) context.strokeRect(side - 9, this.y(row) - space, width + 18, size + 2 * space);
    if (column !== null) context.strokeRect(this.x(column) - space, head - 9, size + 2 * space, height + 18);
  }

  drawLabels(context, across, down) {
    context.font = labelFont();
    context.textBaseline = "middle";
    const write = (end, from, count, put) => {
      for (let i = Math.floor(from); i < Math.min(this.tokens[end].length, Math.ceil(from + count)); i++) {
        const same = this.cell
          ? this.cell[end ? "column" : "row"] === i
          : this.current?.end === end && this.current.index === i;
        context.fillStyle = inkOf(same || this.found[end].has(i) ? "--accent" : "--ink");
        put(labelOf(this.tokens[end][i]), i + 0.5);
      }
    };
    context.textAlign = "right";
    write(
      0,
      this.top,
      down,
      (text, at) => this.y(at) >= this.head && context.fillText(text, this.side - 6, this.y(at), this.side - 8),
    );
    context.textAlign = "left";
    write(1, this.left, across, (text, at) => {
      if (this.x(at) < this.side) return;
      context.save();
      context.translate(this.x(at), this.head - 6);
      context.rotate(-Math.PI / 2);
      context.fillText(text, 0, 0, this.head - 8);
      context.restore();
    });
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.side) / this.size + this.left);
    const row = Math.floor((event.clientY - box.top - this.head) / this.size + this.top);
    const inside = event.clientX >= box.left + this.side && event.clientY >= box.top + this.head;
    return inside && row >= 0 && column >= 0 && row < this.map.rows && column < this.map.columns
      ? { row, column }
      : null;
  }

  read(cell) {
    this.cell = cell;
    if (!cell) return void (this.readout.textContent = "");
    const level = this.map.row(cell.row)[cell.column];
    const unknown = this.map.sparse && !level;
    const weight = unknown ? "not among its largest" : shownWeight(this.map, level);
    const [from, to] = [shown(this.tokens[0][cell.row]), shown(this.tokens[1][cell.column])];
    this.readout.textContent = `${from} (${cell.row}) → ${to} (${cell.column}): ${weight}`;
  }

  listen() {
    const { canvas, act } = this;
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (this.size <= this.fit * 1.001 || event.button) return;
      held = { x: event.clientX, y: event.clientY, left: this.left, top: this.top };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held) {
        this.left = held.left - (event.clientX - held.x) / this.size;
        this.top = held.top - (event.clientY - held.y) / this.size;
        held.moved ||= Math.hypot(event.clientX - held.x, event.clientY - held.y) > 4;
        if (held.moved) return this.redraw();
      }
      const cell = this.at(event);
      if (cell?.row === this.cell?.row && cell?.column === this.cell?.column) return;
      this.read(cell);
      act.hover(cell && { end: 0, index: cell.row });
    });
    canvas.addEventListener("pointerup", () => setTimeout(() => (held = null)));
    canvas.addEventListener("pointerleave", () => (this.read(null), act.hover(null)));
    canvas.addEventListener("click", (event) => {
      const cell = this.at(event);
      if (!cell || held?.moved) return;
      act.choose({ end: 0, index: cell.row });
      this.read(cell);
      this.redraw();
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey) return; // the page's own scrolling stays the page's
        event.preventDefault();
        const box = canvas.getBoundingClientRect();
        this.zoom(Math.exp(-event.deltaY / 200), event.clientX - box.left, event.clientY - box.top);
      },
      { passive: false },
    );
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") this.zoom(1.5);
    else if (event.key === "-") this.zoom(1 / 1.5);
    else if (event.key === "0") this.whole();
    else if (event.key === "Escape") this.act.choose(null);
    else if (step) {
      const last = [this.map.rows - 1, this.map.columns - 1],
        chosen = this.act.chosen();
      const from = this.cell ?? { row: chosen && !chosen.end ? chosen.index : 0, column: -step[1] };
      const [row, column] = [from.row + step[0], from.column + step[1]].map((n, i) =>
        Math.min(Math.max(n, 0), last[i]),
      );
      this.read({ row, column });
      this.act.choose({ end: 0, index: row }, false, this.readout.textContent);
    } else return;
    event.preventDefault();
  }
}

const labelFont = () => `12px ${getComputedStyle(document.body).fontFamily}`;
const labelOf = (token) => (shown(token).length > 12 ? `${shown(token).slice(0, 11)}…` : shown(token));

// Room for the label of the most letters; wider letters are set a little closer.
function labelWidth(tokens) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = labelFont();
  const longest = tokens.reduce((most, token) => (token.length > most.length ? token : most), "");
  return Math.min(LONGEST_LABEL, Math.ceil(context.measureText(labelOf(longest)).width) + 14);
}
