// A study's page while it is looked at: what is told is shown as it comes, and what takes long comes when asked for.

const FRONT = "on the front";

async function load(place, address) {
  place.setAttribute("aria-busy", "true");
  const answer = await fetch(address);
  place.innerHTML = answer.ok ? await answer.text() : "<p role=status>It could not be asked; load the page again.</p>";
  place.removeAttribute("aria-busy");
}

function startLoading(place) {
  if ("now" in place.dataset) {
    load(place, place.dataset.load);
    return;
  }
  place.querySelector("a").addEventListener("click", (event) => {
    event.preventDefault();
    load(place, place.dataset.load);
  });
}

function mark(row, front) {
  const cell = row.querySelector(".standing");
  cell.dataset.own ??= cell.textContent === FRONT ? "feasible" : cell.textContent;
  cell.textContent = front.has(Number(row.dataset.number)) ? FRONT : cell.dataset.own;
}

function addRows(body, html) {
  const made = document.createElement("template");
  made.innerHTML = html;
  for (const row of [...made.content.children]) {
    const known = body.querySelector(`tr[data-number="${row.dataset.number}"]`);
    if (known) known.replaceWith(row);
    else body.append(row);
  }
}

// What has the focus keeps it, where the same is there again.
function replace(place, html) {
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  const again = focused?.getAttribute("href") ?? focused?.getAttribute("aria-label");
  place.innerHTML = html;
  if (!again) return;
  const same = [...place.querySelectorAll("[href], [tabindex]")];
  same.find((each) => [each.getAttribute("href"), each.getAttribute("aria-label")].includes(again))?.focus();
}

function show(place, told, news) {
  replace(place, news.live);
  addRows(told, news.rows);
  const front = new Set(news.front);
  if (news.rows) for (const row of told.rows) mark(row, front);
}

// A browser tries again where the server is gone, and gives up where it answered something else.
function lost(source) {
  return source.readyState === EventSource.CLOSED
    ? "Closed; load the page again"
    : "The server is gone; trying again";
}

function follow(place) {
  const told = document.getElementById("told").tBodies[0];
  const heard = document.getElementById("heard");
  const source = new EventSource(place.dataset.events);
  source.addEventListener("open", () => (heard.textContent = "Live"));
  source.addEventListener("error", () => (heard.textContent = lost(source)));
  source.addEventListener("progress", (event) => {
    const news = JSON.parse(event.data);
    show(place, told, news);
    heard.textContent = news.over ? "Finished" : "Live";
    if (news.over) source.close();
  });
}

for (const place of document.querySelectorAll("[data-load]")) startLoading(place);
const live = document.getElementById("live");
if (live.dataset.events) follow(live);
