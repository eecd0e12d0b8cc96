// Draws what the form says, keeps the address and the tables up to date with it, and shows the point that is chosen.

import { figureOf, nameOf } from "./chart.js";
import { frontOf, placesOf } from "./fronts.js";
import { fillPanel } from "./panel.js";
import { fillBands, fillFronts, fillWorth } from "./tables.js";
import { isShown, queryOf, questionsOf, viewOf } from "./view.js";
import { STATUS_TEXTS, range, titleOf } from "./words.js";

const CONFIG = { displayModeBar: false, doubleClick: "reset", responsive: false };
const NARROW = 600; // pixels: there, a finger that is drawn over the picture scrolls the page
const [AGAIN_MS, TIMES] = [1500, 8];
const EXPORT = { width: 1100, height: 700 };

const get = (id) => document.getElementById(id);
const data = JSON.parse(get("data").textContent);
const [form, chart, panel] = [get("view"), get("chart"), get("chosen")];
const { known, links } = data;
data.studies.forEach((study, place) => Object.assign(study, { number: place, style: known.styles[place] }));

const loaded = new Set(data.studies.map(({ told }) => told.name));

let figure = null;
let zoom = null;
let axes = "";
let revision = 0; // what the user has zoomed to lasts until the next one

function themeNow() {
  const style = getComputedStyle(document.body);
  const named = (name) => style.getPropertyValue(name).trim();
  return {
    ...{ text: style.color, back: named("--pico-background-color"), family: style.fontFamily },
    ...{ muted: named("--pico-muted-color"), grid: named("--pico-muted-border-color"), limit: named("--bad") },
  };
}

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function hoverText(view) {
  const digits = known.xDigits[view.x];
  return (study, { point, x, y, status }) =>
    `<b>${escaped(titleOf(study, point))}</b> of ${escaped(study.told.name)}<br>` +
    `${known.yNames[view.y]} ${range(y, 3)}<br>${known.xNames[view.x]} ${range(x, digits)}<br>${STATUS_TEXTS[status]}`;
}

function forgetZoom() {
  zoom = null;
  revision += 1;
}

// The studies with what they come to on the axes, which is worked out anew only where these have changed.
function placed(view) {
  const asked = JSON.stringify([view.x, view.y, [...view.tasks]]);
  if (asked !== axes) {
    for (const study of data.studies) {
      study.places = placesOf(study, view);
      study.front = frontOf(study.places);
    }
    axes = asked;
    forgetZoom();
  }
  return data.studies.filter((study) => isShown(study, view));
}

function draw(view, shown, questions) {
  const box = { width: chart.clientWidth, height: chart.clientHeight };
  const asked = { shown, questions, view, known, texts: hoverText(view), theme: themeNow(), box, zoom, revision };
  figure = figureOf(asked);
  figure.layout.dragmode = box.width < NARROW ? false : "zoom";
  Plotly.react(chart, figure.data, figure.layout, CONFIG);
}

function tell(view, shown, questions) {
  get("drawn-x").textContent = known.xNames[view.x];
  get("drawn-y").textContent = known.yNames[view.y];
  fillWorth(get("worth"), shown, questions, view, links);
  fillFronts(get("fronts"), shown, view, known, links);
  fillBands(get("bands"), questions, view, known);
  get("has-bands").hidden = questions.length === 0;
  for (const item of get("legend").children) item.hidden = !shown.some(({ number }) => String(number) === item.dataset.study);
  tellMissing(shown);
}

function tellMissing(shown) {
  const without = shown.filter(({ places, points }) => points.number.length > 0 && places.length === 0);
  get("without").textContent =
    without.length > 0 ? `Not drawn, for they do not tell it: ${without.map(({ told }) => told.name).join(", ")}.` : "";
}

function showChosen(view) {
  const study = data.studies.find((each) => view.point.startsWith(`${each.told.name}/`) && pointOf(each, view.point) >= 0);
  panel.hidden = study === undefined;
  if (study) fillPanel(panel, study, pointOf(study, view.point), { known, links });
}

const pointOf = (study, name) => study.points.number.findIndex((_, point) => nameOf(study, point) === name);

function keepAddress() {
  if (!links) return;
  const query = queryOf(form, loaded);
  history.replaceState(null, "", `?${query}`);
  get("csv").href = `/compare.csv?${query}`;
}

let pending = 0;

// The picture at once; the tables as soon as it is painted.
function update() {
  const view = viewOf(form);
  const shown = placed(view);
  const questions = questionsOf(shown);
  draw(view, shown, questions);
  keepAddress();
  clearTimeout(pending);
  pending = setTimeout(() => tell(view, shown, questions), 0);
}

function choose(point) {
  form.elements.point.value = point;
  update();
  showChosen(viewOf(form));
}

function zoomed(change) {
  const side = (name) => chart.layout[name].range;
  if (!Object.keys(change).some((name) => name.includes("axis"))) return;
  zoom = { x: [...side("xaxis")], y: [...side("yaxis")] };
  update();
}

function save(format) {
  const legend = { orientation: "h", y: -0.12 };
  const layout = { ...figure.layout, ...EXPORT, showlegend: true, legend, margin: { ...figure.layout.margin, b: 90 } };
  const options = { format, filename: "fronts", ...EXPORT, scale: format === "png" ? 2 : 1 };
  return Plotly.downloadImage({ data: [...figure.data, ...figure.key], layout }, options);
}

// This page as it is now, null where it cannot be had.
async function fetched() {
  try {
    const answer = await fetch(location.href);
    return answer.ok ? new DOMParser().parseFromString(await answer.text(), "text/html") : null;
  } catch {
    return null;
  }
}

// Ask again for certified versions, where the registry had not answered when the page was made.
// Its note stays until it has, or until there have been enough tries.
async function askAgain(left) {
  const page = await fetched();
  const found = page?.getElementById("data");
  if (!found || page.getElementById("late")) {
    if (left > 0) setTimeout(() => askAgain(left - 1), AGAIN_MS);
    return;
  }
  const versions = new Map(JSON.parse(found.textContent).studies.map((study) => [study.told.name, study.versions]));
  for (const study of data.studies) study.versions = versions.get(study.told.name) ?? study.versions;
  get("notes").replaceChildren(...page.getElementById("notes").children);
  update();
  showChosen(viewOf(form));
}

function listen() {
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => {
    if (!links) event.preventDefault();
  });
  document.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button?.dataset.point !== undefined) choose(button.dataset.point);
    if (button?.dataset.save) save(button.dataset.save);
    if (button?.id === "reset") {
      forgetZoom();
      update();
    }
  });
  chart.on("plotly_click", ({ points: [{ data: trace, pointNumber }] }) => {
    const [study, point] = trace.customdata?.[pointNumber] ?? [];
    if (study !== undefined) choose(nameOf(data.studies[study], point));
  });
  chart.on("plotly_relayout", zoomed);
  document.addEventListener("theme", update);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  new ResizeObserver(() => chart.clientWidth !== figure.layout.width && update()).observe(chart);
}

update();
showChosen(viewOf(form));
listen();
if (get("late")) setTimeout(() => askAgain(TIMES), AGAIN_MS);
document.documentElement.dataset.ready = "true";
