// The picture: what Plotly is told to draw. Points off the fronts are paths; they are hovered and clicked through a
// trace that draws nothing.

import { allBands } from "./bands.js";
import { densePlace } from "./fronts.js";
import { bars, glyphs, keyTraces, offFront } from "./glyphs.js";
import { sidesOf } from "./labels.js";
import { titleOf } from "./words.js";

export const MARGIN = { l: 62, r: 14, t: 24, b: 52 };
const ROOM = 0.04; // beside the outermost points, of the axis
const short = (value) => Number(value.toPrecision(7));

// Where the limit is, if all have the same one.
function limitOf(shown, view) {
  const limits = new Set(shown.map((study) => study.told.limitRatio));
  const [limit] = limits;
  const units = new Set(shown.map((study) => study.told.dense.ms));
  const [ms] = units;
  if (limits.size !== 1 || limit === null) return null;
  return { latency: limit, ms: units.size === 1 && ms !== null ? limit * ms : null }[view.x] ?? null;
}

const limitShape = (x, theme) => ({
  type: "line",
  ...{ x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below" },
  line: { color: theme.limit, width: 1.5, dash: "dash" },
});

const limitText = (x, theme) => ({
  ...{ x, y: 1, yref: "paper", yanchor: "bottom", text: "limit", showarrow: false },
  font: { size: 12, color: theme.limit },
});

function frontTrace(study, texts) {
  const { color, symbol, dash } = study.style;
  return {
    type: "scatter",
    mode: "lines+markers",
    name: study.told.name,
    x: study.front.map(({ x }) => x[0]),
    y: study.front.map(({ y }) => y[0]),
    line: { shape: "hv", color, dash, width: 1.8 },
    marker: { color, symbol, size: 8 },
    ...hovered(study.front.map((place) => [study, place]), texts),
  };
}

const hovered = (members, texts) => ({
  customdata: members.map(([study, place]) => [study.number, place.point]),
  hovertext: members.map(([study, place]) => texts(study, place)),
  hoverinfo: "text",
});

function marks(name, members, texts, marker, rest = {}) {
  return {
    type: "scatter",
    mode: "markers",
    name,
    x: members.map(([, { x }]) => x[0]),
    y: members.map(([, { y }]) => y[0]),
    marker,
    ...hovered(members, texts),
    ...rest,
  };
}

const colorsOf = (members) => members.map(([study]) => study.style.color);

const membersOf = (shown, isOne) =>
  shown.flatMap((study) => study.places.filter(({ point }) => isOne(study, point)).map((place) => [study, place]));

const publishedOf = (shown) => membersOf(shown, (study, point) => study.points.published[point]);
const certifiedOf = (shown) => membersOf(shown, (study, point) => study.versions[point]);
const systemName = ([study, { point }]) => titleOf(study, point).replace(" at limit", "");
const versionNames = ([study, { point }]) => study.versions[point].map((v) => `${v.name} ${v.version}`).join(", ");

// The names that stand in the picture, versions first; systems are named where one study leaves room for that.
function named(shown, theme, now, pixels) {
  const share = (value, [low, high]) => (value - low) / (high - low);
  const at = ({ x, y }) => [share(x[0], now.x) * pixels.x, (1 - share(y[0], now.y)) * pixels.y];
  const certified = certifiedOf(shown);
  const published = shown.length === 1 ? publishedOf(shown) : [];
  const names = [...certified.map(versionNames), ...published.map(systemName)];
  const points = [...certified, ...published].map(([, place]) => at(place));
  const sides = sidesOf(names, points, shown.flatMap(({ front }) => front.map(at)), pixels);
  const labels = (first, size) => ({
    mode: "markers+text",
    text: sides.slice(first, first + size).map((side, place) => (side === null ? "" : names[first + place])),
    textposition: sides.slice(first, first + size).map((side) => side ?? "middle right"),
    textfont: { color: theme.text, size: 11 },
  });
  return { certified: labels(0, certified.length), published: published.length ? labels(certified.length, published.length) : {} };
}

function publishedTrace(shown, texts, labels) {
  const members = publishedOf(shown);
  const marker = { symbol: "diamond-open", size: 11, color: colorsOf(members), line: { width: 1.8, color: colorsOf(members) } };
  return marks("published", members, texts, marker, labels);
}

function certifiedTrace(shown, texts, theme, labels) {
  return marks("certified", certifiedOf(shown), texts, { symbol: "circle-open", size: 17, color: theme.text, line: { width: 2.5 } }, labels);
}

function denseTrace(shown, view, theme) {
  const places = new Map();
  for (const study of shown) {
    const place = densePlace(study, view);
    if (place) places.set(place.join(), place);
  }
  const found = [...places.values()];
  return {
    type: "scatter",
    mode: "markers",
    name: "dense",
    x: found.map(([x]) => x),
    y: found.map(([, y]) => y),
    marker: { symbol: "star", size: 15, color: theme.text },
    hovertext: found.map(([x, y]) => `dense, not pruned<br>${short(x)}, ${short(y)}`),
    hoverinfo: "text",
  };
}

function unseenTrace(off, texts) {
  const members = [...off.values()].flat();
  return marks("others", members, texts, {}, { mode: "none", showlegend: false });
}

function chosenTrace(shown, view, theme) {
  const members = shown.flatMap((study) =>
    study.places.filter(({ point }) => view.point === nameOf(study, point)).map((place) => [study, place]),
  );
  const marker = { symbol: "square-open", size: 20, color: theme.limit, line: { width: 2.5 } };
  return { ...marks("chosen", members, () => "", marker), hoverinfo: "skip", showlegend: false };
}

export const nameOf = (study, point) => `${study.told.name}/${study.points.number[point]}`;

function rangeOf(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || Math.abs(high) || 1) * ROOM;
  return values.length > 0 ? [low - room, high + room] : [0, 1];
}

// The axes: all that is drawn is on them.
function ranges(shown, off, view) {
  const dense = view.hide.has("dense") ? [] : shown.map((study) => densePlace(study, view)).filter(Boolean);
  const there = [...shown.flatMap(({ front }) => front), ...[...off.values()].flat().map(([, place]) => place)];
  if (!view.hide.has("published")) {
    there.push(...shown.flatMap(({ places, points }) => places.filter(({ point }) => points.published[point])));
  }
  const bounds = view.hide.has("bars") ? [] : shown.flatMap(({ front }) => front);
  const side = (name, place) =>
    rangeOf([
      ...there.map(({ [name]: [value] }) => value),
      ...bounds.flatMap(({ [name]: [, low, high] }) => [low, high]).filter((end) => end !== null),
      ...dense.map((at) => at[place]),
    ]);
  return { x: side("x", 0), y: side("y", 1) };
}

// shown: studies with their places and front. box: width and height in pixels. zoom: the axes as the user has them.
export function figureOf({ shown, questions, view, known, texts, theme, box, zoom, revision }) {
  const off = offFront(shown, view);
  const axes = ranges(shown, off, view);
  const now = { x: zoom?.x ?? axes.x, y: zoom?.y ?? axes.y };
  const pixels = { x: box.width - MARGIN.l - MARGIN.r, y: box.height - MARGIN.t - MARGIN.b };
  const limit = limitOf(shown, view);
  const shapes = [
    ...glyphs(off, now, pixels, known.colors, theme),
    ...(view.hide.has("bars") ? [] : bars(shown, known.colors)),
    ...(limit === null ? [] : [limitShape(limit, theme)]),
  ];
  const names = named(shown, theme, now, pixels);
  const annotations = limit === null ? [] : [limitText(limit, theme)];
  const data = [
    ...(view.hide.has("bands") ? [] : allBands(questions)),
    unseenTrace(off, texts),
    ...shown.map((study) => frontTrace(study, texts)),
    ...(view.hide.has("published") ? [] : [publishedTrace(shown, texts, names.published)]),
    ...(view.hide.has("certified") ? [] : [certifiedTrace(shown, texts, theme, names.certified)]),
    ...(view.hide.has("dense") ? [] : [denseTrace(shown, view, theme)]),
    chosenTrace(shown, view, theme),
  ];
  return { data, key: keyTraces(off, theme), layout: layoutOf({ axes, shapes, annotations, view, known, theme, box, revision }) };
}

function layoutOf({ axes, shapes, annotations, view, known, theme, box, revision }) {
  const axis = (title, range) => ({
    ...{ title: { text: title, standoff: 8 }, range, zeroline: false, automargin: false },
    ...{ gridcolor: theme.grid, linecolor: theme.muted, tickcolor: theme.muted },
  });
  return {
    ...{ width: box.width, height: box.height, margin: MARGIN, autosize: false, showlegend: false },
    ...{ hovermode: "closest", hoverdistance: 12, dragmode: "zoom", shapes, annotations },
    ...{ paper_bgcolor: theme.back, plot_bgcolor: theme.back, font: { color: theme.text, size: 12, family: theme.family } },
    uirevision: revision,
    xaxis: axis(known.xNames[view.x], axes.x),
    yaxis: axis(known.yNames[view.y], axes.y),
    hoverlabel: { bgcolor: theme.back, bordercolor: theme.muted, font: { color: theme.text }, align: "left" },
  };
}
