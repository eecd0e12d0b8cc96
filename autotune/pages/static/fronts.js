// Where points lie, fronts, what a front is worth, what several seeds attain: as autotune/pages/fronts.py has it.

const WITHIN = 0;
const QUARTILES_FROM = 4;

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const sized = ([value, low, high], factor) =>
  [value, low, high].map((part) => (part === null ? null : part * factor));

// Dense's x, null where the study does not tell it.
export function unitOf(study, x) {
  const { ms, gflops, cache } = study.told.dense;
  return { latency: 1, ms, gflops, cache }[x];
}

// The places, among a study's tasks, of those that are chosen and scored.
function chosenTasks(study, tasks) {
  const { told } = study;
  const any = tasks.size > 0 && told.tasks.some((task) => tasks.has(task));
  if (tasks.size > 0 && !any) return [];
  return told.tasks.map((task, place) => [task, place]).filter(([task]) => !any || tasks.has(task));
}

function xOf(study, point, x) {
  const { points } = study;
  if (x === "gflops" || x === "cache") return points[x][point] === null ? null : [points[x][point], null, null];
  const unit = unitOf(study, x);
  if (unit === null || points.ratio[point] === null) return null;
  return sized([points.ratio[point], points.ratio_low[point], points.ratio_high[point]], unit);
}

function retention(study, point, scores, dense, isWhole) {
  const base = mean(dense);
  if (base <= 0) return null;
  const minus = isWhole ? study.points.minus[point] : null;
  return minus ? minus.map((part) => 1 + part / base) : [mean(scores) / base, null, null];
}

function yOf(study, point, y, tasks) {
  const { points, told } = study;
  const there = tasks.filter(([, place]) => points.byTask[point][place] !== null);
  if (there.length === 0) return null;
  const isWhole = there.length === told.tasks.length;
  const scores = there.map(([, place]) => points.byTask[point][place]);
  if (y === "accuracy") {
    if (isWhole) return [points.score[point], points.score_low[point], points.score_high[point]];
    return [mean(scores), null, null];
  }
  if (y === "worst" && isWhole) return [points.worst[point], null, null];
  const dense = there.map(([task]) => told.dense.byTask[task] ?? null);
  if (dense.includes(null)) return null;
  if (y === "retention") return retention(study, point, scores, dense, isWhole);
  const shares = scores.map((score, place) => score / dense[place]).filter(Number.isFinite);
  return [shares.length > 0 ? Math.min(...shares) : 1, null, null];
}

// Every point that has a place on the axes: x and y are value, lower and upper bound.
export function placesOf(study, { x, y, tasks }) {
  const chosen = chosenTasks(study, tasks);
  const found = [];
  study.points.number.forEach((_, point) => {
    const across = xOf(study, point, x);
    const up = across && yOf(study, point, y, chosen);
    if (up) found.push({ point, x: across, y: up, status: study.points.status[point] });
  });
  return found;
}

// Where dense lies, null where the study does not tell it.
export function densePlace(study, { x, y, tasks }) {
  const unit = unitOf(study, x);
  const scores = chosenTasks(study, tasks).map(([task]) => study.told.dense.byTask[task] ?? null);
  if (unit === null || scores.length === 0) return null;
  if (y !== "accuracy") return [unit, 1];
  return scores.includes(null) ? null : [unit, mean(scores)];
}

// Those within the limit that no other one beats in both x and y, by x; of equals the first.
export function frontOf(places) {
  const able = places.filter(({ status }) => status === WITHIN);
  able.sort((a, b) => a.x[0] - b.x[0] || b.y[0] - a.y[0]);
  let best = -Infinity;
  return able.filter(({ y: [value] }) => value > best && ((best = value), true));
}

// The area between a front and the reference point: dense's x, and y = 0; x as a share of dense's.
export function hypervolume(front, unit) {
  return front.reduce((area, { x: [x], y: [y] }, place) => {
    const until = place + 1 < front.length ? front[place + 1].x[0] : Infinity;
    const width = Math.min(until / unit, 1) - x / unit;
    return width > 0 && y > 0 ? area + width * y : area;
  }, 0);
}

// How many of so many fronts are few, half and most.
export function levelsOf(number) {
  const half = Math.ceil(number / 2);
  if (number < QUARTILES_FROM) return [1, half, number];
  return [Math.ceil(number / 4), half, Math.ceil((3 * number) / 4)];
}

export const reached = (steps, x) => {
  const before = steps.filter(([at]) => at <= x);
  return before.length > 0 ? before.at(-1)[1] : null;
};

// The steps [x, y] of what so many of the fronts attain.
export function surface(fronts, level) {
  const stairs = fronts.map((front) => front.map(({ x, y }) => [x[0], y[0]]));
  const xs = [...new Set(stairs.flat().map(([x]) => x))].sort((a, b) => a - b);
  const steps = [];
  for (const x of xs) {
    const heights = stairs.map((steps) => reached(steps, x)).filter((y) => y !== null);
    const y = heights.sort((a, b) => b - a)[level - 1];
    if (y !== undefined && (steps.length === 0 || y > steps.at(-1)[1])) steps.push([x, y]);
  }
  return steps;
}
