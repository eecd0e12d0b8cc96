// What is to be shown, as the page's form has it and its address says it.

const DEFAULTS = { x: "latency", y: "accuracy", point: "" };

export function viewOf(form) {
  const given = new FormData(form);
  const all = (name) => new Set(given.getAll(name));
  return {
    ...{ studies: all("study"), devices: all("device"), limits: all("limit"), tasks: all("task"), hide: all("hide") },
    ...{ x: given.get("x"), y: given.get("y"), point: given.get("point") },
  };
}

// loaded: the names of the studies that are here; what is chosen beside them is not shown yet.
export function queryOf(form, loaded) {
  const shown = [...new FormData(form)].filter(([name, value]) => name !== "study" || loaded.has(value));
  const query = new URLSearchParams(shown);
  for (const [name, value] of Object.entries(DEFAULTS)) if (query.get(name) === value) query.delete(name);
  if (!query.has("study")) query.set("study", ""); // none; without a word, the server would choose
  return query.toString();
}

export function isShown({ told }, { studies, devices, limits }) {
  const passes = (chosen, value) => chosen.size === 0 || chosen.has(value);
  return studies.has(told.name) && passes(devices, told.device) && passes(limits, told.limit);
}

// Shown studies that differ in seed alone, several each.
export function questionsOf(shown) {
  const found = new Map();
  for (const study of shown.filter(({ told }) => told.question)) {
    found.set(study.told.question, [...(found.get(study.told.question) ?? []), study]);
  }
  return [...found.values()].filter((members) => members.length > 1);
}
