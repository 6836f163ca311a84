// Lines: those who look on the left, what they look at on the right; the stronger a line, the more weight.
// Only what can be seen is drawn, so that length costs nothing.

const ROW = 26,
  LINES_OF_A_ROW = 8,
  LINES_OF_A_CHOICE = 64;

class Lines {
  constructor(box, map, place, act) {
    Object.assign(this, { map, place, act, chosen: null, current: null, found: [new Set(), new Set()] });
    this.top = map.largest(LINES_OF_A_ROW);
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.columns = [0, 1].map((end) => new Column(end, place, act, (to) => this.columns[to].box.focus()));
    const rows = Math.max(map.rows, map.columns);
    this.sheet = el(
      "div",
      { class: "sheet" },
      this.columns[0].box,
      el("div", { class: "between" }, this.canvas),
      this.columns[1].box,
    );
    this.sheet.style.height = `${rows * ROW}px`;
    this.scroller = el("div", { class: "lines", onscroll: () => this.redraw() }, this.sheet);
    const names = el(
      "div",
      { class: "ends", "aria-hidden": "true" },
      el("span", {}, "looks"),
      el("span", {}, "is looked at"),
    );
    box.replaceChildren(names, this.scroller);
    this.redraw();
  }

  show({ current, chosen, levels, found, follow }) {
    Object.assign(this, { current, chosen, levels, found });
    if (follow && chosen) this.follow(chosen.index);
    this.redraw();
  }

  // One step at the edge moves by a row; whatever is further away comes to the middle.
  follow(index) {
    const { scrollTop, clientHeight } = this.scroller;
    const above = scrollTop + ROW - index * ROW,
      below = (index + 2) * ROW - scrollTop - clientHeight;
    if (Math.max(above, below) > 3 * ROW) this.scroller.scrollTop = index * ROW - clientHeight / 2;
    else if (above > 0) this.scroller.scrollTop -= above;
    else if (below > 0) this.scroller.scrollTop += below;
  }

  redraw() {
    const { scrollTop, clientHeight } = this.scroller;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - 2),
      last = Math.ceil((scrollTop + clientHeight) / ROW) + 2;
    for (const column of this.columns) {
      const levels = this.current && this.current.end !== column.end ? this.levels : null;
      column.render(first, last, levels, this);
    }
    const width = this.canvas.parentElement.clientWidth;
    const context = sharp(this.canvas, width, clientHeight);
    const at = (index) => index * ROW + ROW / 2 - scrollTop;
    this.strokes(first, last).forEach((lines, level) => {
      if (!lines.length) return;
      const size = Math.abs(level - 8) / 8;
      context.globalAlpha = 0.1 + 0.9 * size;
      context.lineWidth = 0.75 + 3.25 * size * size;
      context.strokeStyle = inkOf(level < 8 ? "--m1" : "--accent");
      context.beginPath();
      for (const [i, j] of lines) {
        context.moveTo(0, at(i));
        context.bezierCurveTo(width * 0.4, at(i), width * 0.6, at(j), width, at(j));
      }
      context.stroke();
    });
  }

  // The lines to draw, in 17 groups of equal strength; 0 to 7 are below zero.
  strokes(first, last) {
    const groups = Array.from({ length: 17 }, () => []);
    const put = (i, j, level) => level && groups[8 + (Math.round(level / 32) || Math.sign(level))].push([i, j]);
    const { current, top } = this;
    if (current)
      for (const { index: other, level } of strongest(this.levels, LINES_OF_A_CHOICE))
        put(...(current.end ? [other, current.index] : [current.index, other]), level);
    else {
      for (let n = 0; n < top.at.length; n++) {
        const i = Math.floor(n / top.k),
          j = top.at[n];
        if ((i >= first && i < last) || (j >= first && j < last)) put(i, j, top.values[n]);
      }
    }
    return groups;
  }
}

// Tokens in a column, of which only those in view are in the document.
class Column {
  constructor(end, place, act, cross) {
    this.end = end;
    this.tokens = tokensOf(place, end);
    this.options = new Map();
    this.box = tokenList(end, place, act, (key, index) => {
      if (key === "ArrowLeft" || key === "ArrowRight") return void cross(key === "ArrowRight" ? 1 : 0);
      return index + ({ ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 }[key] ?? 0);
    });
  }

  render(first, last, levels, { current, chosen, found }) {
    last = Math.min(last, this.tokens.length);
    for (const [index, option] of this.options) {
      if (index >= first && index < last) continue;
      option.remove();
      this.options.delete(index);
    }
    for (let index = first; index < last; index++) {
      let option = this.options.get(index);
      if (!option) {
        option = tokenOption(this.end, index, this.tokens, shown);
        option.style.top = `${index * ROW}px`;
        this.options.set(index, option);
        this.box.append(option);
      }
      shade(option, levels ? levels[index] : null);
      dress(option, this.end, index, current, chosen, found);
    }
    announceOption(this.box, this.end, chosen, this.options.has(chosen?.index));
  }
}

// --- What all lists of tokens share

// A list box that one moves through by keys; `move(key, index)` says where to, or nothing.
function tokenList(end, place, act, move) {
  const name = `${record.sides[end ? place.columns : place.rows].name}: tokens that ${end ? "are looked at" : "look"}`;
  const box = el("div", { role: "listbox", tabindex: "0", class: "tokens", "aria-label": name });
  const indexOf = (event) => event.target.closest?.("[role=option]")?.dataset.index;
  box.addEventListener(
    "pointerover",
    (event) => event.pointerType !== "touch" && indexOf(event) && act.hover({ end, index: +indexOf(event) }),
  );
  box.addEventListener("pointerleave", () => act.hover(null));
  box.addEventListener("click", (event) => indexOf(event) && act.choose({ end, index: +indexOf(event) }, true));
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = tokensOf(place, end).length - 1,
      chosen = act.chosen();
    const index = chosen?.end === end ? chosen.index : -1;
    if (event.key === "Escape") act.choose(null);
    else if (event.key === "Home" || event.key === "End") act.choose({ end, index: event.key === "Home" ? 0 : last });
    else if (/^(Arrow|Page)/.test(event.key)) {
      const to = move(event.key, Math.max(index, 0));
      if (to !== undefined) act.choose({ end, index: index < 0 ? 0 : Math.min(Math.max(to, 0), last) });
    } else return;
    event.preventDefault();
  });
  return box;
}

function tokenOption(end, index, tokens, as = visible) {
  const option = el("span", {
    role: "option",
    id: `token-${end}-${index}`,
    "aria-setsize": tokens.length,
    "aria-posinset": index + 1,
  });
  option.dataset.index = index;
  option.append(el("bdi", {}, as(tokens[index])));
  option.title = `token ${index}`;
  return option;
}

function dress(option, end, index, current, chosen, found) {
  option.setAttribute("aria-selected", String(chosen?.end === end && chosen.index === index));
  option.classList.toggle("current", current?.end === end && current.index === index);
  option.classList.toggle("match", found[end].has(index));
}

function announceOption(box, end, chosen, there) {
  if (there && chosen?.end === end) box.setAttribute("aria-activedescendant", `token-${end}-${chosen.index}`);
  else box.removeAttribute("aria-activedescendant");
}
