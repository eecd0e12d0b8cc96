// Run before anything is painted: the colours that were chosen here, or else those of the system.
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    chosen = null; // a browser may keep its store shut
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
