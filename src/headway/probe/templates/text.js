// Text: the tokens as they are read, or the patches of a picture where they lie, shaded by weight.

class Text {
  constructor(box, map, place, act) {
    Object.assign(this, { map, place, act });
    this.own = !isCross(place); // one row of tokens looks at itself
    const ends = this.own ? [act.end()] : [0, 1];
    this.lists = ends.map((end) => {
      const side = record.sides[end ? place.columns : place.rows];
      return side.grid ? new Patches(end, side, place, act) : new Flow(end, side, place, act);
    });
    box.replaceChildren(
      ...this.lists.flatMap((list) => (this.own ? [list.frame] : [el("h3", {}, list.side.name), list.frame])),
    );
  }

  show({ current, chosen, levels, found, follow }) {
    for (const list of this.lists) {
      const shaded = this.own || list.end !== (current?.end ?? 0);
      list.render(shaded ? levels : null, current, chosen, found);
      if (follow && chosen?.end === list.end) list.options[chosen.index].scrollIntoView({ block: "nearest" });
    }
  }

  redraw() {
    for (const list of this.lists) list.before = null;
  }
}

class Flow {
  constructor(end, side, place, act) {
    Object.assign(this, { end, side });
    this.box = this.frame = tokenList(end, place, act, (key, index) => this.beside(key, index));
    this.box.classList.add("flow");
    this.options = side.tokens.map((_, index) => tokenOption(end, index, side.tokens));
    this.options.forEach((option, index) => {
      const token = side.tokens[index];
      if (/^\s/.test(token)) option.classList.add("spaced");
      this.box.append(option, token.includes("\n") ? el("br") : "\u200b");
    });
  }

  render(levels, current, chosen, found) {
    const name = isDark() + (levels ? "" : "none");
    this.options.forEach((option, index) => {
      if (!this.before || this.before.name !== name || this.before.levels?.[index] !== levels?.[index])
        this.shade(option, levels ? levels[index] : null);
    });
    this.before = { levels, name };
    this.dress(current, chosen, found);
  }

  // Only what was or is marked is touched.
  dress(current, chosen, found) {
    const marked = new Set(
      [...found[this.end], current?.index, chosen?.index].filter(
        (index) => index !== undefined && index < this.options.length,
      ),
    );
    for (const index of new Set([...(this.marked ?? this.options.keys()), ...marked]))
      dress(this.options[index], this.end, index, current, chosen, found);
    this.marked = marked;
    announceOption(this.box, this.end, chosen, true);
  }

  shade(option, level) {
    shade(option, level);
  }

  // Left and right are the neighbours, up and down the nearest in the next line.
  beside(key, index) {
    if (key === "ArrowLeft" || key === "ArrowRight") return index + (key === "ArrowRight" ? 1 : -1);
    const step = key === "ArrowDown" || key === "PageDown" ? 1 : -1,
      here = this.options[index].getBoundingClientRect();
    let best = index,
      line = null;
    for (let n = index + step; n >= 0 && n < this.options.length; n += step) {
      const there = this.options[n].getBoundingClientRect();
      if (Math.abs(there.top - here.top) < 3) continue;
      if (line !== null && Math.abs(there.top - line) >= 3) break;
      if (
        line === null ||
        Math.abs(there.left - here.left) < Math.abs(this.options[best].getBoundingClientRect().left - here.left)
      )
        best = n;
      line = there.top;
    }
    return best;
  }
}

class Patches extends Flow {
  constructor(end, side, place, act) {
    super(end, side, place, act);
    const [down, across] = side.grid;
    this.box.classList.replace("flow", "patched");
    const patches = el(
      "div",
      { class: "patches", role: "presentation" },
      ...this.options.slice(side.skip, side.skip + down * across),
    );
    patches.style.gridTemplateColumns = `repeat(${across}, 1fr)`;
    patches.style.gridTemplateRows = `repeat(${down}, 1fr)`;
    const rest = this.options.filter((option) => !option.closest(".patches"));
    const picture = el("div", { class: "picture", role: "presentation" }, patches);
    if (side.picture) {
      const image = el("img", { alt: "", src: side.picture });
      image.addEventListener(
        "load",
        () => (picture.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`),
        { once: true },
      );
      picture.prepend(image);
    }
    picture.style.aspectRatio = `${across} / ${down}`;
    for (const option of patches.children)
      option.setAttribute("aria-label", option.textContent), option.replaceChildren();
    this.box.replaceChildren(
      ...(rest.length ? [el("div", { class: "rest", role: "presentation" }, ...rest)] : []),
      picture,
    );
    this.bare = !side.picture;
  }

  shade(option, level) {
    if (!option.closest(".patches")) return shade(option, level);
    const [r, g, b] = level === null ? [0, 0, 0] : palette("picture").ramps[level < 0 ? 1 : 0][Math.abs(level)];
    option.style.background =
      level === null ? "" : `rgb(${r} ${g} ${b} / ${this.bare ? 1 : 0.45 + (0.4 * Math.abs(level)) / 255})`;
  }
}
