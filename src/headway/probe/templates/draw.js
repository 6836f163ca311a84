// Draw: colours of levels, small helpers for elements, the thumbnails.

const $ = (id) => document.getElementById(id);

// An element; texts are texts, never markup.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// One blue, darker (on dark: lighter) the larger the level, so that it reads without colour; orange for below zero.
const STOPS = {
  light: [
    ["#f5f8fb", "#c9e0f0", "#82badf", "#2f86c1", "#0a568c", "#06294a"],
    ["#faf7f4", "#f7d9bd", "#efab6b", "#cf7420", "#8d4a08", "#4a2503"],
  ],
  dark: [
    ["#1a1f26", "#173a56", "#1e6497", "#3f9bd8", "#9bd0f4", "#f4faff"],
    ["#1a1f26", "#4a2f14", "#85521a", "#cf8430", "#f3bd83", "#fff3e6"],
  ],
  picture: [
    ["#00224e", "#2a3f6d", "#575d6d", "#8a8779", "#c3b369", "#fee838"],
    ["#00224e", "#4a2f14", "#85521a", "#cf8430", "#f3bd83", "#fff3e6"],
  ],
};
const hex = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

function ramp(stops) {
  const colours = stops.map(hex),
    last = stops.length - 1;
  return Array.from({ length: 256 }, (_, level) => {
    const at = (level / 255) * last,
      from = Math.min(Math.floor(at), last - 1);
    return colours[from].map((c, i) => Math.round(c + (colours[from + 1][i] - c) * (at - from)));
  });
}

class Palette {
  constructor(name) {
    this.ramps = STOPS[name].map(ramp);
    this.css = this.ramps.map((one) => one.map((rgb) => `rgb(${rgb.join(" ")})`));
    this.ink = this.ramps.map((one) => one.map((rgb) => (luminance(rgb) > 0.179 ? "#000" : "#fff")));
    this.words = this.ramps.map(
      (one) => new Uint32Array(one.map(([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r)),
    );
  }
  colour(level) {
    return this.css[level < 0 ? 1 : 0][Math.abs(level)];
  }
  inkOn(level) {
    return this.ink[level < 0 ? 1 : 0][Math.abs(level)];
  }
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (darkSystem.matches ? "dark" : "light")) === "dark";
const PALETTES = {};
const palette = (name = isDark() ? "dark" : "light") => (PALETTES[name] ??= new Palette(name));

// Levels as a canvas, a pixel each.
function painted(levels, rows, columns, { words } = palette()) {
  const canvas = el("canvas", { width: columns, height: rows });
  const image = new ImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let n = 0; n < pixels.length; n++) pixels[n] = words[levels[n] < 0 ? 1 : 0][Math.abs(levels[n])];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// A canvas as sharp as the screen; returns its context in CSS pixels.
function sharp(canvas, width, height) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

const inkOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Shade an element by a level, or clear it.
function shade(element, level) {
  element.style.background = level === null ? "" : palette().colour(level);
  element.style.color = level === null ? "" : palette().inkOn(level);
}
