// Heads: thumbnails of all, a row a layer, walked through by arrow keys; and the clearest head of each pattern.

function buildHeads(thumbs) {
  const groups = Map.groupBy(record.places, (place) => `${place.stack} ${place.slot}`);
  for (const [, places] of groups) {
    const title = [several("stack") ? places[0].stack : "", slotName(places[0])].filter(Boolean).join(", ") || "layers";
    const most = Math.max(...places.map((place) => place.heads));
    const rows = places.map((place) => {
      const label = place.slot.match(/^(rollout|relevance)/) ? "all" : String(place.layer);
      const cells = Array.from({ length: place.heads }, (_, head) => headCell(place.first + head));
      const row = el(
        "div",
        { role: "row" },
        el("span", { role: "rowheader" }, el("span", { class: "hidden" }, "layer "), label),
        ...cells,
      );
      row.style.gridTemplateColumns = `1.6rem repeat(${most}, minmax(20px, 52px))`;
      return row;
    });
    const grid = el(
      "div",
      {
        role: "grid",
        "aria-label": `Heads: ${title}`,
        "aria-describedby": "choose-help",
        onkeydown: moveHead,
        onclick: (event) => cellUnder(event, open),
        onpointerover: (event) => cellUnder(event, foresee),
      },
      ...rows,
    );
    const single = places.length === 1 && most === 1;
    $("heads").append(
      el(
        "div",
        { class: single ? "group single" : "group" },
        ...(groups.size > 1 ? [el("h3", {}, title)] : []),
        el("div", { class: "scroll" }, grid),
      ),
    );
  }
  $("heads").append(patterns());
  paintHeads(thumbs);
}

function headCell(index) {
  const { pattern, score } = record.heads[index];
  const name = headName(index) + (pattern ? `, ${pattern} ${figure(score, 2)}` : "");
  return el("div", {
    role: "gridcell",
    id: `cell-${index}`,
    tabindex: "-1",
    "aria-selected": "false",
    "aria-label": name,
    title: name,
    "data-index": index,
  });
}

function paintHeads(thumbs) {
  const side = record.thumb;
  for (let i = 0; i < headsInAll; i++)
    $(`cell-${i}`).replaceChildren(painted(thumbs.subarray(i * side * side, (i + 1) * side * side), side, side));
}

// The best head of each pattern, a button each.
function patterns() {
  const best = new Map();
  record.heads.forEach(
    ({ pattern, score }, i) =>
      pattern && (!best.has(pattern) || score > record.heads[best.get(pattern)].score) && best.set(pattern, i),
  );
  const items = [...best].map(([pattern, i]) =>
    el(
      "li",
      {},
      el(
        "button",
        { type: "button", onclick: () => act.open(i, true) },
        el("strong", {}, pattern),
        ` ${headName(i)}`,
        el("small", {}, `score ${figure(record.heads[i].score, 2)}`),
      ),
    ),
  );
  return items.length
    ? el("div", { class: "patterns" }, el("h3", {}, "Clearest of each pattern"), el("ul", {}, ...items))
    : el("div");
}

function selectHead() {
  for (const cell of document.querySelectorAll("[role=gridcell][tabindex='0']"))
    (cell.tabIndex = -1), cell.setAttribute("aria-selected", "false");
  const cell = $(`cell-${state.index}`);
  cell.tabIndex = 0;
  cell.setAttribute("aria-selected", "true");
  const scroller = cell.closest(".scroll"); // alone: the page stays where it is
  const [box, outer] = [cell.getBoundingClientRect(), scroller.getBoundingClientRect()];
  if (box.top < outer.top) scroller.scrollTop += box.top - outer.top - 4;
  else if (box.bottom > outer.bottom) scroller.scrollTop += box.bottom - outer.bottom + 4;
}

// What is pointed at, or beside what is seen, is unpacked before it is asked for.
function foresee(index) {
  if (index >= 0 && index < headsInAll) opening(index).catch(() => null);
}

function cellUnder(event, then) {
  const cell = event.target.closest("[role=gridcell]");
  if (cell) then(+cell.dataset.index);
}

function moveHead(event) {
  const { place, head } = here(),
    row = record.places.indexOf(place);
  const to = (n) => record.places[n] && record.places[n].first + Math.min(head, record.places[n].heads - 1);
  const moves = {
    ArrowLeft: state.index - 1,
    ArrowRight: state.index + 1,
    ArrowUp: to(row - 1),
    ArrowDown: to(row + 1),
    Home: place.first,
    End: place.first + place.heads - 1,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const index = moves[event.key];
  if (index === undefined || index < 0 || index >= headsInAll) return;
  open(index);
  $(`cell-${index}`).focus();
}
