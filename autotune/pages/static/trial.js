// The layer that pictures and schedules show follows the slider.
import "./copy.js";

const slider = document.getElementById("layer");
const pictures = [...document.querySelectorAll("svg.picture")].map((svg) => ({
  svg,
  count: svg.parentElement.querySelector(".count"),
  all: Number(svg.dataset.all),
  drops: [...svg.querySelectorAll(".drop")],
  name: svg.dataset.name,
}));

function show(node, visible) {
  if (visible) node.removeAttribute("display");
  else node.setAttribute("display", "none");
}

function alive({ drops, all }, layer) {
  const gone = drops.filter((drop) => Number(drop.dataset.layer) <= layer);
  return gone.length ? Number(gone.at(-1).dataset.alive) : all;
}

function words(picture, layer) {
  const num = alive(picture, layer);
  const share = picture.all ? num / picture.all : 0;
  return `${num} of ${picture.all} image tokens (${(100 * share).toFixed(0)} %)`;
}

function draw(picture, layer) {
  for (const drop of picture.drops) show(drop, Number(drop.dataset.layer) <= layer);
  const said = words(picture, layer);
  picture.count.textContent = said;
  picture.svg.setAttribute("aria-label", `${picture.name}: ${said}`);
}

function point(layer) {
  for (const svg of document.querySelectorAll("svg[data-step]")) {
    const cursor = svg.querySelector(".cursor");
    show(cursor, layer >= 0);
    cursor.setAttribute("x", Number(svg.dataset.left) + layer * Number(svg.dataset.step));
  }
}

function look() {
  const layer = Number(slider.value);
  const said = layer < 0 ? "before the first layer" : `in layer ${layer}`;
  document.getElementById("alive").textContent = said;
  slider.setAttribute("aria-valuetext", said);
  pictures.forEach((picture) => draw(picture, layer));
  point(layer);
}

if (slider) {
  slider.form.querySelector("button").hidden = true;
  slider.form.addEventListener("submit", (event) => event.preventDefault());
  slider.addEventListener("input", look);
  look();
}
