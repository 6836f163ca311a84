// Data: the record, and the maps of heads, unpacked when they are first asked for.
// A level is what is kept of a weight, -255..255: the weight is (level / 255)^2 of the head's largest.

const record = JSON.parse(document.getElementById("record").textContent);
const headsInAll = record.heads.length;

// The text of an element that may not have been read yet: the maps stand behind this script, so that it starts at once.
async function arrived(id) {
  while (!document.getElementById(id)?.nextSibling) {
    if (document.readyState !== "loading") throw new Error(`this file is cut short: ${id} is missing`);
    await new Promise((done) => setTimeout(done, 15));
  }
  return document.getElementById(id).textContent;
}

async function unpacked(id) {
  const text = await arrived(id);
  const packed = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// Two rows of tokens, of which one looks at the other.
const isCross = (place) => place.rows !== place.columns;

// The place, and the head in it, of a head counted through all places.
function placed(index) {
  const place = record.places.findLast((one) => one.first <= index);
  return { place, head: index - place.first };
}

const tokensOf = (place, end) => record.sides[end ? place.columns : place.rows].tokens;

function levels(buffer, offset, length, signed) {
  if (!signed) return new Uint8Array(buffer, offset, length);
  return Int16Array.from(new Int8Array(buffer, offset, length), (v) => Math.round((v * 255) / 127));
}

// A map as a whole: every level is there.
class Whole {
  constructor(index, buffer) {
    const { place } = placed(index);
    this.how = record.heads[index];
    this.share = place.share;
    this.rows = tokensOf(place, 0).length;
    this.columns = tokensOf(place, 1).length;
    this.all = levels(buffer, 0, this.rows * this.columns, this.how.signed);
    this.picture = { rows: this.rows, columns: this.columns, size: 1, levels: this.all };
  }
  row(i) {
    return this.all.subarray(i * this.columns, (i + 1) * this.columns);
  }
  column(j) {
    const found = new Int16Array(this.rows);
    for (let i = 0; i < this.rows; i++) found[i] = this.all[i * this.columns + j];
    return found;
  }
  largest(k) {
    return (this.kept ??= largestOfRows(this, k));
  }
}

// Block means of a map, and the largest weights of each row.
class Sparse {
  constructor(index, buffer) {
    const { place } = placed(index);
    const how = (this.how = record.heads[index]);
    this.share = place.share;
    this.rows = tokensOf(place, 0).length;
    this.columns = tokensOf(place, 1).length;
    const [down, across] = [Math.ceil(this.rows / how.size), Math.ceil(this.columns / how.size)];
    const kept = this.rows * how.k;
    this.picture = {
      rows: down,
      columns: across,
      size: how.size,
      levels: levels(buffer, 0, down * across, how.groundSigned),
    };
    this.at = new Uint32Array(buffer.slice(down * across, down * across + 4 * kept));
    this.values = levels(buffer, down * across + 4 * kept, kept, how.signed);
    this.sparse = true;
  }
  row(i) {
    const found = new Int16Array(this.columns);
    for (let n = i * this.how.k; n < (i + 1) * this.how.k; n++) found[this.at[n]] = this.values[n];
    return found;
  }
  column(j) {
    const found = new Int16Array(this.rows);
    for (let n = 0; n < this.at.length; n++) if (this.at[n] === j) found[Math.floor(n / this.how.k)] = this.values[n];
    return found;
  }
  largest() {
    return { k: this.how.k, at: this.at, values: this.values };
  }
}

// The columns and levels of the k largest of each row, as a sparse map has them.
function largestOfRows(map, k) {
  k = Math.min(k, map.columns);
  const at = new Uint32Array(map.rows * k),
    values = new Int16Array(map.rows * k);
  for (let i = 0; i < map.rows; i++) {
    const from = i * k,
      row = map.row(i);
    for (let j = 0; j < map.columns; j++) {
      const size = Math.abs(row[j]);
      if (size <= Math.abs(values[from + k - 1])) continue;
      let n = from + k - 1;
      for (; n > from && Math.abs(values[n - 1]) < size; n--) [values[n], at[n]] = [values[n - 1], at[n - 1]];
      [values[n], at[n]] = [row[j], j];
    }
  }
  return { k, at, values };
}

const opened = new Map(); // the last few heads: moving back and forth unpacks nothing twice
function opening(index) {
  if (!opened.has(index)) {
    const kind = "size" in record.heads[index] ? Sparse : Whole;
    opened.set(
      index,
      unpacked(`head-${index}`).then((buffer) => new kind(index, buffer)),
    );
    if (opened.size > 32) opened.delete(opened.keys().next().value);
  }
  return opened.get(index);
}

const weightOf = (map, level) => Math.sign(level) * (level / 255) ** 2 * map.how.scale;

// What token `index` looks at (end 0), or who looks at it (end 1), as levels; of no token, what all look at on average.
function levelsSeen(map, chosen) {
  if (chosen) return chosen.end ? map.column(chosen.index) : map.row(chosen.index);
  const sums = new Float64Array(map.columns);
  if (map.sparse) map.at.forEach((j, n) => (sums[j] += weightOf(map, map.values[n])));
  else
    for (let i = 0, n = 0; i < map.rows; i++)
      for (let j = 0; j < map.columns; j++) sums[j] += Math.sign(map.all[n]) * map.all[n++] ** 2;
  const top = sums.reduce((most, v) => Math.max(most, Math.abs(v)), 0) || 1;
  return Int16Array.from(sums, (v) => Math.round(Math.sign(v) * 255 * Math.sqrt(Math.abs(v) / top)));
}

// The k tokens of the largest levels, the largest first.
function strongest(found, k) {
  const best = [];
  found.forEach((level, index) => {
    const size = Math.abs(level);
    if (!size || (best.length === k && size <= best[k - 1].size)) return;
    let n = best.length;
    while (n && best[n - 1].size < size) n--;
    best.splice(n, 0, { index, level, size });
    if (best.length > k) best.pop();
  });
  return best;
}

function percent(weight) {
  const size = Math.abs(weight) * 100;
  if (size > 0 && size < 0.005) return "<0.01%";
  return `${(weight * 100).toFixed(size >= 9.95 ? 0 : size >= 0.995 ? 1 : 2)}%`;
}
const shownWeight = (map, level) =>
  map.how.signed || !map.share ? weightOf(map, level).toPrecision(3) : percent(weightOf(map, level));

// A token in few words: without the spaces around it.
const shown = (token) => visible(token).trim() || visible(token);

// A token as it can be seen: spaces and ends of lines have signs.
function visible(token) {
  if (token === "") return "∅";
  return token
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/^ +$/, (s) => "␣".repeat(s.length))
    .replace(/[\u0000-\u001f\u007f]/g, "�");
}
