// Where names stand beside points so that none covers another, or another point; one that has no room is left out.

const [LETTER, LINE, GAP] = [6.2, 13, 7]; // pixels: of a letter's width, of a line, from a point to its name
const SIDES = ["middle right", "middle left", "bottom right", "top right", "bottom left", "top left", "bottom center", "top center"];

function boxAt([x, y], width, side) {
  const [up, across] = side.split(" ");
  const left = { right: x + GAP, left: x - GAP - width, center: x - width / 2 }[across];
  const top = { middle: y - LINE / 2, bottom: y + GAP, top: y - GAP - LINE }[up];
  return { left, top, right: left + width, bottom: top + LINE };
}

const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const isWithin = ({ left, right, top, bottom }, { x, y }) => left >= 0 && right <= x && top >= 0 && bottom <= y;

// The side for each name, null where there is no room. points, others: [x, y] in pixels, of those that have names and
// of those that have none; pixels: the size of the picture.
export function sidesOf(names, points, others, pixels) {
  const taken = [...points, ...others].map(([x, y]) => ({ left: x - GAP, right: x + GAP, top: y - GAP, bottom: y + GAP }));
  return names.map((name, place) => {
    const width = LETTER * name.length;
    const isFree = (box) => isWithin(box, pixels) && taken.every((other, at) => at === place || !meet(box, other));
    const side = SIDES.find((each) => isFree(boxAt(points[place], width, each))) ?? null;
    if (side !== null) taken.push(boxAt(points[place], width, side));
    return side;
  });
}
