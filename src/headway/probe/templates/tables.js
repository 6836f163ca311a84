// Tables: the same figures for those who read rather than look, and what they mean.

const PAGE_OF_ROWS = 100,
  COLUMNS_OF_ROW = 5;

// Strongest tokens of one token as a list of bars.
function bars(map, place, chosen, levels, title, act) {
  const end = chosen.end ? 0 : 1,
    tokens = tokensOf(place, end);
  const items = strongest(levels, 8).map(({ index, level, size }) => {
    const bar = el("i");
    bar.style.width = `${(size / 255) ** 2 * 100}%`;
    const item = el(
      "li",
      { "data-index": index },
      el("bdi", {}, shown(tokens[index])),
      el("small", {}, `${index}`),
      el("b", {}, shownWeight(map, level)),
      el("span", { class: "track", "aria-hidden": "true" }, bar),
    );
    item.addEventListener("click", () => act.choose({ end, index }));
    return item;
  });
  return el("div", {}, el("h3", {}, title), items.length ? el("ol", {}, ...items) : el("p", {}, "no token"));
}

function sentence(map, place, chosen, levels) {
  const tokens = tokensOf(place, chosen.end ? 0 : 1);
  const list = strongest(levels, 3).map(
    ({ index, level }) => `${shown(tokens[index])} (${index}) ${shownWeight(map, level)}`,
  );
  const verb = chosen.end ? "is looked at most by" : "looks most at";
  const name = shown(tokensOf(place, chosen.end)[chosen.index]);
  return `${name} (${chosen.index}) ${verb} ${list.join(", ") || "no token"}`;
}

function table(caption, head, rows) {
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", {}, caption),
      el(
        "thead",
        {},
        el("tr", {}, ...head.map((one) => (one instanceof Node ? one : el("th", { scope: "col" }, one)))),
      ),
      el("tbody", {}, ...rows),
    ),
  );
}

// The largest weights of each row, a hundred rows at a time.
function weightTable(box, map, place, from = 0) {
  const { k, at, values } = map.largest(LINES_OF_A_ROW),
    columns = Math.min(k, COLUMNS_OF_ROW);
  const [looking, looked] = [tokensOf(place, 0), tokensOf(place, 1)],
    to = Math.min(from + PAGE_OF_ROWS, map.rows);
  const rows = [];
  for (let i = from; i < to; i++) {
    const cells = Array.from({ length: columns }, (_, n) => {
      const level = values[i * k + n],
        j = at[i * k + n];
      return level
        ? el("td", {}, el("bdi", {}, shown(looked[j])), ` ${shownWeight(map, level)}`, el("small", {}, `token ${j}`))
        : el("td", {}, "–");
    });
    rows.push(
      el(
        "tr",
        {},
        el("th", { scope: "row" }, el("bdi", {}, shown(looking[i])), el("small", {}, `token ${i}`)),
        ...cells,
      ),
    );
  }
  const names = ["Token", ...["Looks most at", "second", "third", "fourth", "fifth"].slice(0, columns)];
  const turn = (name, start) =>
    el(
      "button",
      { type: "button", disabled: start < 0 || start >= map.rows, onclick: () => weightTable(box, map, place, start) },
      name,
    );
  const pages =
    map.rows > PAGE_OF_ROWS
      ? [
          el(
            "p",
            { class: "turns" },
            turn("Back", from - PAGE_OF_ROWS),
            ` tokens ${from} to ${to - 1} of ${map.rows} `,
            turn("On", from + PAGE_OF_ROWS),
          ),
        ]
      : [];
  box.replaceChildren(
    table(`The ${columns} largest weights of each token, ${headName(state.index)}`, names, rows),
    ...pages,
  );
}

function headName(index) {
  const { place, head } = placed(index);
  return place.note && place.heads === 1 ? placeName(place) : `${placeName(place)}, head ${head}`;
}

const several = (key) => new Set(record.places.map((place) => place[key])).size > 1;
const slotName = ({ slot }) => ({ self: "", cross: "cross-attention" })[slot] ?? slot;
function placeName(place) {
  const among = record.places.filter((one) => one.stack === place.stack && one.slot === place.slot).length;
  return [several("stack") ? place.stack : "", slotName(place), !place.note || among > 1 ? `layer ${place.layer}` : ""]
    .filter(Boolean)
    .join(" ");
}

const figure = (value, digits) => (value === null ? "–" : value.toFixed(digits));

// All heads, sorted by a column that one chooses.
function headTable(box, act, key = "head", down = false) {
  const value = {
    head: (i) => i,
    pattern: (i) => record.heads[i].pattern ?? "\uffff",
    score: (i) => record.heads[i].score,
    entropy: (i) => record.heads[i].entropy,
    distance: (i) => record.heads[i].distance,
  };
  const order = record.heads
    .map((_, i) => i)
    .sort((a, b) => {
      const [x, y] = [value[key](a), value[key](b)];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1; // what has none stands last, either way
      return (x < y ? -1 : 1) * (down ? -1 : 1);
    });
  const titles = {
    head: "Head",
    pattern: "Pattern",
    score: "Score",
    entropy: "Entropy, nats",
    distance: "Distance, tokens",
  };
  const heads = Object.entries(titles).map(([name, title]) => {
    const sorted = name === key ? (down ? "descending" : "ascending") : null;
    const again = () => (
      headTable(box, act, name, name === key ? !down : name !== "head" && name !== "pattern"),
      box.querySelector(`[data-key=${name}]`).focus()
    );
    return el(
      "th",
      { scope: "col", "aria-sort": sorted },
      el("button", { type: "button", "data-key": name, onclick: again }, title),
    );
  });
  const rows = order.map((i) => {
    const { pattern, score, entropy, distance } = record.heads[i];
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, el("button", { type: "button", onclick: () => act.open(i, true) }, headName(i))),
      el("td", {}, pattern ?? "–"),
      el("td", {}, figure(score, 2)),
      el("td", {}, figure(entropy, 2)),
      el("td", {}, figure(distance, 1)),
    );
  });
  box.replaceChildren(table("All heads; choose a head to see it, a title to sort", heads, rows));
}

function meaning(box, map) {
  const parts = Object.entries(record.definitions).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
  const { k, size, scale, signed } = map.how;
  const levels = signed ? 127 : 255,
    step = scale / levels;
  const off = signed || !map.share ? step.toPrecision(2) : percent(step);
  const kept = map.sparse
    ? `This text is long: of each row the ${k} largest weights are kept, and of the map the means over ${size} × ${size} ` +
      "weights. Who looks at a token is told as far as it is among those."
    : "Every weight is kept.";
  const exactly =
    ` A weight is kept as its square root, in ${levels} steps up to the head's largest, ${shownWeight(map, 255)}: it is ` +
    `off by at most ${off}, small ones by much less. Colours follow the same root, so that small weights show. ` +
    "Thumbnails are means over at most 32 × 32 blocks, scaled to the largest of each.";
  box.replaceChildren(el("p", {}, kept + exactly), ...(parts.length ? [el("dl", {}, ...parts)] : []));
}
