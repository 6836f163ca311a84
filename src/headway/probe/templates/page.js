// Page: what is chosen, kept in the address, and what follows from it.

const VIEWS = { lines: Lines, matrix: Matrix, text: Text };
const state = { index: 0, view: "lines", end: 0, chosen: null, hovered: null, matches: [], find: "" };
let map = null,
  view = null,
  frame = 0;

const act = {
  hover(token) {
    if (token?.end === state.hovered?.end && token?.index === state.hovered?.index) return;
    state.hovered = token;
    frame ||= requestAnimationFrame(() => ((frame = 0), show()));
  },
  // A second click on the same token lets it go.
  choose(token, toggle = false, said = null) {
    const { chosen } = state;
    const again = toggle && token && chosen?.end === token.end && chosen.index === token.index;
    state.chosen = again ? null : token;
    state.hovered = null;
    show(!again && token !== null);
    remember();
    $("status").textContent =
      said ?? (state.chosen && map ? sentence(map, here().place, state.chosen, levelsSeen(map, state.chosen)) : "");
  },
  chosen: () => state.chosen,
  end: () => state.end,
  open: (index, far = false) => open(index).then(() => far && $("headline").scrollIntoView({ block: "nearest" })),
};

const here = () => placed(state.index);
const isOwn = () => !isCross(here().place);

// --- Showing

async function open(index) {
  state.index = index;
  selectHead();
  const found = await opening(index);
  if (state.index !== index) return; // another was chosen meanwhile
  map = found;
  if (state.chosen && state.chosen.index >= tokensOf(here().place, state.chosen.end).length) state.chosen = null;
  build();
  remember();
  setTimeout(() => [index - 1, index + 1].forEach(foresee), 200);
}

function build() {
  const { place } = here(),
    { heads } = record;
  const sides = [place.rows, place.columns].map((n) => record.sides[n]);
  state.hovered = null;
  search(false);
  $("headline").textContent = headName(state.index).replace(/^./, (letter) => letter.toUpperCase());
  $("about").replaceChildren(...about(place, heads[state.index]));
  $("lines-name").textContent = isCross(place) ? "Alignment" : "Lines";
  $("text-name").textContent = sides.some((side) => side.grid) ? "Picture" : "Text";
  $("direction").hidden = !(state.view === "text" && isOwn());
  for (const [name, value] of [
    ["view", state.view],
    ["end", String(state.end)],
  ])
    for (const radio of document.getElementsByName(name)) radio.checked = radio.value === value;
  if (isOwn() && state.view === "text" && state.chosen) state.chosen.end = state.end;
  view = new VIEWS[state.view]($("view"), map, place, act);
  $("view").dataset.showing = `${state.index} ${state.view}`;
  legend();
  show(true);
  for (const details of document.querySelectorAll("details[open]")) fill(details);
}

function about(place, { pattern, score, entropy, distance, error }) {
  const words = [place.note ? `${place.note}. ` : `Mixer: ${place.mixer}. `];
  if (pattern)
    words.push(
      el("strong", {}, `${pattern} ${figure(score, 2)}`),
      record.definitions[pattern] ? `: ${record.definitions[pattern]}. ` : ". ",
    );
  if (error !== null) words.push(`It is ${percent(error)} away from the softmax of the same queries and keys. `);
  if (entropy !== null) words.push(`Entropy ${entropy.toFixed(2)} nats. `);
  if (distance !== null) words.push(`Looks ${distance.toFixed(1)} tokens away on average.`);
  return words;
}

function show(follow = false) {
  if (!map) return;
  const { place } = here(),
    current = state.hovered ?? state.chosen;
  const levels = levelsSeen(map, current);
  view.show({ current, chosen: state.chosen, levels, found: found(), follow });
  $("hint").textContent = hint(current);
  if (!current)
    return void $("details").replaceChildren(
      el("p", { class: "note" }, "Point at a token, or choose one, to see where it looks and who looks at it."),
    );
  const name = el(
    "p",
    { class: "chosen" },
    el("bdi", {}, shown(tokensOf(place, current.end)[current.index])),
    ` token ${current.index}`,
  );
  const other = { end: 1 - current.end, index: current.index };
  const lists =
    isOwn() && map.rows === map.columns ? [current.end ? other : current, current.end ? current : other] : [current];
  const title = (end) => (end ? "Who looks at it" : "Where it looks") + (end && map.sparse ? ", as far as kept" : "");
  $("details").replaceChildren(
    name,
    ...lists.map((one) => bars(map, place, one, one === current ? levels : levelsSeen(map, one), title(one.end), act)),
  );
}

function hint(current) {
  if (state.view === "lines")
    return current
      ? `At most ${LINES_OF_A_CHOICE} lines; shading shows every weight.`
      : `The ${map.largest(LINES_OF_A_ROW).k} largest weights of each row.`;
  if (state.view === "matrix") return matrixHint();
  if (current) return "";
  return "Shaded by how much each is looked at on average; scaled to the most.";
}

function matrixHint() {
  const { k, size } = map.how;
  const marks = isCross(here().place) && map.rows * map.columns < 10000 ? " Rings mark the largest of each row." : "";
  const means = ` Squares of ${size} tokens are means, on a scale of their own; near enough, the ${k} largest of each row show.`;
  const moves = "Rows look, columns are looked at. Arrow keys move, + and − zoom; drag to move about.";
  return moves + marks + (map.sparse ? means : "");
}

function legend() {
  const colours = state.view === "text" && record.sides[here().place.columns].grid ? palette("picture") : palette();
  const canvas = $("ramp"),
    context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++)
    (context.fillStyle = colours.css[0][Math.round((x / (canvas.width - 1)) * 255)]), context.fillRect(x, 0, 1, 1);
  $("legend-text").textContent =
    `0 to ${shownWeight(map, 255)}, this head's largest` + (map.how.signed ? "; orange is below zero" : "");
}

// --- Search

const found = () =>
  [0, 1].map((end) => new Set(state.matches.filter((one) => one.end === end).map((one) => one.index)));

function search(redraw = true) {
  const wanted = state.find.trim().toLowerCase(),
    { place } = here();
  const ends = isOwn() ? [state.view === "text" ? state.end : 0] : [0, 1];
  const tell = (text) => $("found").textContent === text || ($("found").textContent = text);
  state.matches = [];
  if (wanted)
    for (const end of ends)
      tokensOf(place, end).forEach(
        (token, index) => token.toLowerCase().includes(wanted) && state.matches.push({ end, index }),
      );
  tell(wanted ? `${state.matches.length} found` : "");
  if (redraw) show();
}

function nextMatch() {
  const { matches, chosen } = state;
  if (!matches.length) return;
  const at = chosen ? matches.findIndex((one) => one.end === chosen.end && one.index === chosen.index) : -1;
  const next = (at + 1) % matches.length;
  act.choose({ ...matches[next] });
  $("found").textContent = `${next + 1} of ${matches.length}`;
}

// --- The address

let written = "",
  writing = 0;

function fragment() {
  const { place, head } = here(),
    { chosen } = state;
  const parts = { layer: place.layer, head, view: state.view };
  if (several("stack")) parts.stack = place.stack;
  if (several("slot")) parts.slot = place.slot;
  if (chosen) parts.token = chosen.index;
  if (chosen ? chosen.end : state.end) parts.end = 1;
  return `#${new URLSearchParams(parts)}`;
}

function remember() {
  $("link").href = fragment();
  clearTimeout(writing); // browsers refuse too many a second
  writing = setTimeout(() => {
    written = fragment();
    try {
      history.replaceState(null, "", written);
    } catch {
      location.hash = written;
    }
  }, 120);
}

function restore() {
  const given = new URLSearchParams(location.hash.slice(1)),
    number = (key) => (/^\d+$/.test(given.get(key) ?? "") ? Number(given.get(key)) : null);
  const matching = record.places.filter((place) =>
    ["stack", "slot"].every((key) => !given.has(key) || given.get(key) === place[key]),
  );
  const place = matching.find((one) => one.layer === number("layer")) ?? matching[0] ?? record.places[0];
  state.end = given.get("end") === "1" ? 1 : 0;
  if (given.get("view") in VIEWS) state.view = given.get("view");
  else if (!given.has("view") && record.sides[place.columns].grid) state.view = "text";
  const token = number("token");
  state.chosen = token === null ? null : { end: state.end, index: token };
  return open(place.first + Math.min(number("head") ?? 0, place.heads - 1));
}

// --- The rest

function fill(details) {
  const box = details.querySelector(".filled");
  if (details.id === "weights") weightTable(box, map, here().place);
  else if (details.id === "meaning") meaning(box, map);
  else if (!box.firstChild) headTable(box, act);
}

function nextTheme() {
  const themes = ["system", "light", "dark"],
    root = document.documentElement;
  const next = themes[(themes.indexOf(root.dataset.theme ?? "system") + 1) % 3];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  $("theme").textContent = `Theme: ${next}`;
}

async function start() {
  const sizes = record.sides.map(({ name, tokens, grid }) => {
    const what = grid ? "patches and marks" : tokens.length === 1 ? "token" : "tokens";
    return `${name}: ${tokens.length.toLocaleString("en")} ${what}`;
  });
  $("what").textContent = `${sizes.join("; ")}. ${headsInAll} map${headsInAll === 1 ? "" : "s"}.`;
  const thumbs = new Uint8Array(await unpacked("thumbs"));
  buildHeads(thumbs);
  const recolour = () => (paintHeads(thumbs), map && (legend(), view.redraw(), show()));
  $("theme").addEventListener("click", () => (nextTheme(), recolour()));
  darkSystem.addEventListener("change", recolour);
  $("views").addEventListener("change", (event) => ((state.view = event.target.value), build(), remember()));
  $("direction").addEventListener("change", (event) => {
    state.end = +event.target.value;
    if (state.chosen) state.chosen.end = state.end;
    build();
    remember();
  });
  $("find").addEventListener("input", (event) => ((state.find = event.target.value), search()));
  $("find").addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), nextMatch()));
  $("next").addEventListener("click", nextMatch);
  $("link").addEventListener("click", (event) => (event.preventDefault(), copyLink()));
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", () => details.open && map && fill(details));
  addEventListener("hashchange", () => location.hash !== written && restore());
  let width = innerWidth;
  addEventListener("resize", () => width !== innerWidth && ((width = innerWidth), map && build()));
  await restore();
}

async function copyLink() {
  location.hash = written = fragment();
  const told = await navigator.clipboard?.writeText(location.href).then(
    () => "Copied",
    () => null,
  );
  $("link").textContent = told ?? "It is in the address bar";
  setTimeout(() => ($("link").textContent = "Link to this view"), 2000);
}

start().catch((error) => {
  $("what").textContent = `This page cannot be shown: ${error.message}`;
  throw error;
});
