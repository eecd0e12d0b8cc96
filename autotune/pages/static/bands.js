// What studies attain that differ in seed alone: the median as a line, a band from most of them to few.

import { levelsOf, reached, surface } from "./fronts.js";

// A line by its steps, held until an x.
function stairs(steps, until) {
  const x = steps.map(([x]) => x);
  const y = steps.map(([, y]) => y);
  return { x: [...x, until], y: [...y, y.at(-1)] };
}

// What lies between two surfaces, from where both attain something; every corner of the steps is said.
function between(few, most, until) {
  const from = most[0][0];
  const corners = (steps) => {
    const inner = steps.filter(([x]) => x > from);
    let y = reached(steps, from);
    const found = [[from, y]];
    for (const [x, next] of inner) {
      found.push([x, y], [x, next]);
      y = next;
    }
    return [...found, [until, y]];
  };
  const outline = [...corners(few), ...corners(most).reverse()];
  return { x: outline.map(([x]) => x), y: outline.map(([, y]) => y) };
}

function bandTraces(members, name) {
  const fronts = members.map(({ front }) => front);
  const [few, half, most] = levelsOf(fronts.length).map((level) => surface(fronts, level));
  const until = Math.max(...fronts.flat().map(({ x }) => x[0]));
  const { color } = members[0].style;
  const base = { type: "scatter", mode: "lines", hoverinfo: "skip", legendgroup: name };
  const edge = (steps) => ({
    ...{ ...base, ...stairs(steps, until), showlegend: false },
    ...{ line: { shape: "hv", color, width: 0.8 }, opacity: 0.6 },
  });
  const found = [few, most].filter((steps) => steps.length > 0).map(edge);
  if (most.length > 0) {
    found.unshift({ ...base, ...between(few, most, until), fill: "toself", fillcolor: `${color}33`, line: { width: 0 }, showlegend: false });
  }
  if (half.length > 0) found.push({ ...base, ...stairs(half, until), name, line: { shape: "hv", color, width: 5 }, opacity: 0.35 });
  return found;
}

export function allBands(questions) {
  return questions.flatMap((members) => bandTraces(members, `median of ${members.length} seeds, ${members[0].told.model}`));
}
