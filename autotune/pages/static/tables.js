// What the picture shows, as tables: the same that the server writes for the address.

import { hypervolume, levelsOf, reached, surface, unitOf } from "./fronts.js";
import { isPublished, number, range, titleOf, versionText } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function swatch(place) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#swatch-${place}`);
  svg.append(use);
  return svg;
}

const cell = (text, isNumber = true) => element("td", { className: isNumber ? "number" : "" }, text);
const link = (text, href, links) => (links ? element("a", { href }, text) : text);
export const studyHref = ({ told }) => `/studies/${encodeURIComponent(told.name)}`;
export const trialHref = (study, point) => `${studyHref(study)}/trials/${study.points.number[point]}`;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
}

const spread = (values) => (values.length > 0 ? [median(values), Math.min(...values), Math.max(...values)] : null);

const areaOf = (study, view) => {
  const unit = unitOf(study, view.x);
  return unit === null ? null : hypervolume(study.front, unit);
};

export const seedsText = (members) => {
  const { model, limit, device } = members[0].told;
  return `${members.length} seeds of ${model}, ${limit}, ${device}`;
};

function worth(study, view) {
  const area = areaOf(study, view);
  const { points, told, front } = study;
  return {
    study,
    ...{ trials: `${points.number.length} of ${told.target}`, members: String(front.length) },
    ...{ area: area === null ? null : [area, null, null], best: front.at(-1)?.y ?? null },
  };
}

function worthOfAll(members, view) {
  const sizes = members.map(({ front }) => front.length);
  return {
    members: `${number(sizes.reduce((a, b) => a + b, 0) / sizes.length, 1)} each`,
    name: seedsText(members),
    trials: String(members.reduce((sum, { points }) => sum + points.number.length, 0)),
    area: spread(members.map((study) => areaOf(study, view)).filter((area) => area !== null)),
    best: spread(members.map(({ front }) => front.at(-1)?.y[0]).filter((y) => y !== undefined)),
  };
}

function worthRow({ study, name, trials, members, area, best }, links) {
  const head = element("th", { scope: "row" });
  if (study) head.append(swatch(study.number), " ", link(study.told.name, studyHref(study), links));
  else head.append(name);
  const cells = [cell(trials), cell(members), cell(area ? range(area, 4) : "–"), cell(best ? range(best, 3) : "–")];
  return element("tr", {}, head, ...cells);
}

export function fillWorth(body, shown, questions, view, links) {
  const lines = [...shown.map((study) => worth(study, view)), ...questions.map((members) => worthOfAll(members, view))];
  lines.sort((a, b) => (b.area?.[0] ?? -1) - (a.area?.[0] ?? -1));
  body.replaceChildren(...lines.map((line) => worthRow(line, links)));
}

function marks(study, place) {
  const versions = study.versions[place.point] ?? [];
  const isOff = versions.length > 0 && !study.front.includes(place);
  const published = isPublished(study, place.point) ? "published" : "";
  return [published, ...versions.map((version) => `certified as ${versionText(version)}`), isOff ? "off the front" : ""].filter(Boolean).join("; ");
}

// The front, and certified versions wherever they lie, by x.
function listed(study) {
  const others = study.places.filter((place) => study.versions[place.point] && !study.front.includes(place));
  return [...study.front, ...others].sort((a, b) => a.x[0] - b.x[0]);
}

function frontRow(study, place, digits, links) {
  const { point } = place;
  const name = titleOf(study, point);
  const label = `Show ${name} of ${study.told.name}`;
  const button = element("button", { type: "button", className: "plain", ariaLabel: label }, "Show");
  button.dataset.point = `${study.told.name}/${study.points.number[point]}`;
  const head = element("th", { scope: "row" }, swatch(study.number), " ", study.told.name);
  return element(
    "tr",
    {},
    ...[head, element("td", {}, link(name, trialHref(study, point), links))],
    ...[cell(range(place.x, digits)), cell(range(place.y, 3)), cell(marks(study, place), false)],
    element("td", {}, button),
  );
}

export function fillFronts(body, shown, view, known, links) {
  const digits = known.xDigits[view.x];
  const rows = shown.flatMap((study) => listed(study).map((place) => frontRow(study, place, digits, links)));
  body.replaceChildren(...rows);
}

function bandRows(members, digits) {
  const fronts = members.map(({ front }) => front);
  const [few, half, most] = levelsOf(fronts.length).map((level) => surface(fronts, level));
  const at = (steps, x) => {
    const y = reached(steps, x);
    return cell(y === null ? "–" : number(y, 3));
  };
  return half.map(([x, y]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, seedsText(members)),
      ...[cell(number(x, digits)), cell(number(y, 3)), at(few, x), at(most, x)],
    ),
  );
}

export function fillBands(body, questions, view, known) {
  body.replaceChildren(...questions.flatMap((members) => bandRows(members, known.xDigits[view.x])));
}
