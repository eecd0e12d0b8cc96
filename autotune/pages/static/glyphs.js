// Points off the fronts, and bars, drawn as a few paths: that takes a tenth of the time that as many of Plotly's own
// would.

const RANKS = ["beaten", "uncertain", "infeasible", "stopped"]; // by status; those within the limit are beaten

const GLYPH = 3.2; // half of what one is wide, in pixels

const short = (value) => Number(value.toPrecision(7));

// Lines about (x, y), half as wide as (dx, dy): a cross, a dash, a diamond.
const GLYPHS = {
  stopped: (x, y, dx, dy) =>
    `M${short(x - dx)},${short(y - dy)}L${short(x + dx)},${short(y + dy)}M${short(x - dx)},${short(y + dy)}L${short(x + dx)},${short(y - dy)}`,
  infeasible: (x, y, dx) => `M${short(x - dx)},${short(y)}L${short(x + dx)},${short(y)}`,
  uncertain: (x, y, dx, dy) => diamond(x, y, 1.2 * dx, 1.2 * dy),
  beaten: (x, y, dx, dy) => diamond(x, y, dx, dy),
};

function diamond(x, y, dx, dy) {
  return `M${short(x - dx)},${short(y)}L${short(x)},${short(y + dy)}L${short(x + dx)},${short(y)}L${short(x)},${short(y - dy)}Z`;
}

// What is not on its front, and not hidden: [study, place] by how it is drawn.
export function offFront(shown, view) {
  const found = new Map(RANKS.map((rank) => [rank, []]));
  for (const study of shown) {
    const best = new Set(study.front);
    for (const place of study.places) {
      const rank = RANKS[place.status];
      const isMarked = study.points.published[place.point] && !view.hide.has("published");
      if (!best.has(place) && !isMarked && !view.hide.has(rank)) found.get(rank).push([study, place]);
    }
  }
  return found;
}

function path(rank, members, [dx, dy]) {
  return members.map(([, { x, y }]) => GLYPHS[rank](x[0], y[0], dx, dy)).join("");
}

// axes: what the picture shows; box: how many pixels it is.
export function glyphs(off, axes, box, colors, theme) {
  const size = ["x", "y"].map((side) => (GLYPH * Math.abs(axes[side][1] - axes[side][0])) / Math.max(1, box[side]));
  const shapes = [];
  for (const [rank, members] of off) {
    if (rank !== "beaten") {
      if (members.length > 0) shapes.push(drawn(path(rank, members, size), theme.muted, "rgba(0,0,0,0)", 0.6));
      continue;
    }
    for (const color of colors) {
      const own = members.filter(([study]) => study.style.color === color);
      if (own.length > 0) shapes.push(drawn(path(rank, own, size), color, color, 0.75));
    }
  }
  return shapes;
}

const drawn = (path, color, fillcolor, opacity) => ({
  type: "path",
  layer: "below",
  path,
  fillcolor,
  opacity,
  line: { color, width: 1.2 },
});

function bar({ x: [x, left, right], y: [y, low, high] }) {
  const across = left === null ? "" : `M${short(left)},${short(y)}L${short(right)},${short(y)}`;
  return low === null ? across : `${across}M${short(x)},${short(low)}L${short(x)},${short(high)}`;
}

// The intervals of what is on the fronts.
export function bars(shown, colors) {
  const found = colors.map((color) => {
    const own = shown.filter(({ style }) => style.color === color).flatMap(({ front }) => front);
    return drawn(own.map(bar).join(""), color, "rgba(0,0,0,0)", 0.5);
  });
  return found.filter(({ path }) => path !== "");
}

const SYMBOLS = { beaten: "diamond", uncertain: "diamond-open", infeasible: "line-ew-open", stopped: "x-thin-open" };

// What the paths are, for a legend; they have none.
export function keyTraces(off, theme) {
  return [...off].filter(([, members]) => members.length > 0).map(([rank]) => ({
    type: "scatter",
    mode: "markers",
    name: rank === "infeasible" ? "over the limit" : rank,
    ...{ x: [null], y: [null], hoverinfo: "skip" },
    marker: { symbol: SYMBOLS[rank], color: theme.muted, size: 7, line: { width: 1.2, color: theme.muted } },
  }));
}
