// What every page has: the choice between light and dark, and tables that are sorted by their headings.

const root = document.documentElement;
const system = window.matchMedia("(prefers-color-scheme: dark)");

const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

function keep(theme) {
  try {
    localStorage.setItem("theme", theme);
  } catch {
    return; // then it lasts until the next page
  }
}

function show(button) {
  button.setAttribute("aria-pressed", String(isDark()));
}

function startTheme(button) {
  const tell = () => {
    show(button);
    document.dispatchEvent(new CustomEvent("theme", { detail: isDark() ? "dark" : "light" }));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    keep(root.dataset.theme);
    tell();
  });
  system.addEventListener("change", tell);
  show(button);
}

const worth = (cell) => {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text);
  return text !== "" && Number.isFinite(number) ? number : text;
};

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last, either way
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

function sortBy(table, column, falling) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [worth(row.cells[column]), row]);
  const sign = falling ? -1 : 1;
  rows.sort(([a], [b]) => (a === "" || b === "" ? compare(a, b) : sign * compare(a, b)));
  body.replaceChildren(...rows.map(([, row]) => row));
  for (const heading of table.tHead.rows[0].cells) heading.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
}

function startSorting(table) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = heading.querySelector("button");
    if (!button) continue;
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const falling = before ? before === "ascending" : "falling" in heading.dataset;
      sortBy(table, heading.cellIndex, falling);
    });
  }
}

startTheme(document.getElementById("theme"));
for (const table of document.querySelectorAll("table[data-sortable]")) startSorting(table);
