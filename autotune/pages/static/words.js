// Numbers and plans in words, as the server writes them.

export function number(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}

// "0.912 [0.900, 0.923]" of a value and its bounds.
export function range([value, low, high], digits) {
  const told = number(value, digits);
  return low === null || high === null ? told : `${told} [${number(low, digits)}, ${number(high, digits)}]`;
}

export const titleOf = (study, point) => study.points.name[point] ?? `trial ${study.points.number[point]}`;

export const isPublished = (study, point) => Boolean(study.points.published[point]);

export const versionText = ({ name, version, aliases }) => [`${name} ${version}`, ...aliases].join(", ");

export function stageText([layer, keep, selector, weight], weighted) {
  const lambda = weighted.includes(selector) ? `, lambda ${number(weight, 2)}` : "";
  return `before layer ${layer}: keep ${number(keep, 2)}, ${selector}${lambda}`;
}

export const STATUS_TEXTS = ["within the limit", "uncertain", "over the limit or below the guard", "stopped by racing"];
