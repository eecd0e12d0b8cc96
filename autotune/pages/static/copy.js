// A button for every text that is there to be copied.

const SAID_MS = 2000;

async function copy(box) {
  const said = box.querySelector(".said");
  try {
    await navigator.clipboard.writeText(box.querySelector("code").textContent);
    said.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(box.querySelector("code"));
    said.textContent = "Selected: copy it with the keyboard";
  }
  setTimeout(() => { said.textContent = ""; }, SAID_MS);
}

for (const box of document.querySelectorAll(".copied")) {
  const button = box.querySelector(".copy");
  button.hidden = false;
  button.addEventListener("click", () => copy(box));
}
