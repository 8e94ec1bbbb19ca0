// Sends one screen, as a PNG, to `/act` and shows the policy's action.

import { Bars } from "./bars.js";
import * as token from "./token.js";

const $ = (id) => document.getElementById(id);

// `policy()` returns {path, meanings, values, exploration} of the chosen policy. `frame()` returns the PNG of the last
// frame, or null.
export function install(policy, frame) {
  const bars = new Bars($("opinion"));

  async function ask(png) {
    const { path, meanings, values, exploration } = policy();
    const outputs = ["action", values].filter(Boolean).join();
    const query = new URLSearchParams({ outputs, ...(exploration && { exploration }) });
    const started = performance.now();
    try {
      const response = await fetch(`${path}act?${query}`, {
        method: "POST", headers: { ...token.headers(), "Content-Type": "image/png" }, body: png,
      });
      const duration = performance.now() - started;
      const document = await response.json();
      await draw(png);
      if (!response.ok) throw new Error(document.error.message);
      $("answer").replaceChildren("The policy would take ", strong(meanings[document.action] ?? document.action));
      $("asked").textContent = `${duration.toFixed(1)} ms round trip`;
      bars.name(values ? meanings : []);
      if (values) bars.show(document.action, document[values]);
    } catch (error) {
      bars.name([]);
      $("asked").textContent = "";
      $("answer").textContent = error.message;
    }
  }

  async function draw(png) {
    const pen = $("thumb").getContext("2d");
    pen.clearRect(0, 0, 160, 210);
    try {
      pen.drawImage(await createImageBitmap(png), 0, 0, 160, 210);
    } catch {} // not an image: the service answers with the error
  }

  $("file").addEventListener("change", () => {
    if ($("file").files.length) ask($("file").files[0]);
    $("file").value = "";
  });
  $("use").addEventListener("click", async () => ask(frame() ?? (await (await fetch("page/sample.png")).blob())));

  let depth = 0; // how many nested elements the drag has entered
  const dragOver = (change) => {
    depth = change ? depth + change : 0;
    document.body.classList.toggle("dropping", depth > 0);
  };
  addEventListener("dragenter", () => dragOver(1));
  addEventListener("dragleave", () => dragOver(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    dragOver(0);
    if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
  });
}

function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}
