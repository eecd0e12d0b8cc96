// What is known of the one point that was chosen.

import { element, studyHref, trialHref } from "./tables.js";
import { STATUS_TEXTS, isPublished, number, range, stageText, titleOf, versionText } from "./words.js";

function facts(study, point) {
  const { points, told } = study;
  const ratio = [points.ratio[point], points.ratio_low[point], points.ratio_high[point]];
  const found = [["status", STATUS_TEXTS[points.status[point]] + (isPublished(study, point) ? "; published" : "")]];
  const add = (name, text) => found.push([name, text]);
  if (points.byTask[point].length > 0) {
    add("macro accuracy", range([points.score[point], points.score_low[point], points.score_high[point]], 3));
    add("worst task keeps", number(points.worst[point], 3));
  }
  if (points.minus[point]) add("minus dense", range(points.minus[point], 3));
  if (ratio[0] !== null) add("latency to dense", range(ratio, 3));
  if (ratio[0] !== null && told.dense.ms !== null) add("latency", `${number(ratio[0] * told.dense.ms, 2)} ms`);
  if (points.gflops[point] !== null) add("image tokens", `${number(points.gflops[point], 2)} GFLOPs`);
  if (points.cache[point] !== null) add("cache", `${number(points.cache[point], 2)} MiB`);
  add("samples", String(points.samples[point]));
  return element("dl", { className: "facts" }, ...found.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

function plan(study, point, weighted) {
  const stages = study.points.plan[point];
  if (stages.length === 0) return element("p", {}, "Dense: no stage.");
  return element("ol", {}, ...stages.map((stage) => element("li", {}, stageText(stage, weighted))));
}

function taskTable(study, point) {
  const { points, told } = study;
  const row = (task, place) => {
    const score = points.byTask[point][place];
    const dense = told.dense.byTask[task] ?? null;
    const cells = [score, dense].map((value) => element("td", { className: "number" }, value === null ? "–" : number(value, 3)));
    return element("tr", {}, element("th", { scope: "row" }, task), ...cells);
  };
  const head = (name, place) => element("th", { scope: "col", className: place > 0 ? "number" : "" }, name);
  const heads = ["task", "plan", "dense"].map(head);
  return element(
    "table",
    {},
    element("caption", {}, "Accuracy by task"),
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...told.tasks.map(row)),
  );
}

function links(study, point) {
  const versions = study.versions[point] ?? [];
  const found = [element("a", { href: trialHref(study, point) }, "Trial"), element("a", { href: studyHref(study) }, "Study")];
  for (const version of versions) {
    const href = `/profiles/${encodeURIComponent(version.name)}?version=${version.version}`;
    found.push(element("a", { href }, `Profile ${versionText(version)}`));
  }
  return element("p", { className: "row" }, ...found);
}

export function fillPanel(panel, study, point, { known, links: hasPages }) {
  const close = element("button", { type: "button", className: "plain" }, "Close");
  close.dataset.point = "";
  const certified = (study.versions[point] ?? []).map(versionText);
  panel.replaceChildren(
    element("h2", {}, `${titleOf(study, point)} of ${study.told.name}`),
    element("div", { className: "columns" }, element("div", {}, facts(study, point), plan(study, point, known.weighted)), taskTable(study, point)),
    ...(certified.length > 0 ? [element("p", {}, `Certified: ${certified.join("; ")}`)] : []),
    ...(hasPages ? [links(study, point)] : []),
    close,
  );
}
