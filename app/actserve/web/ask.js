// One screen, as a PNG: what would the policy do? `/act` answers.

import { Bars } from "/page/bars.js";
import * as token from "/page/token.js";

const $ = (id) => document.getElementById(id);

// `policy()`: {path, meanings, values, exploration} of what is chosen. `frame()`: the last frame's PNG, or null.
export function install(policy, frame) {
  const bars = new Bars($("opinion"));

  async function ask(png) {
    const { path, meanings, values, exploration } = policy();
    const outputs = ["action", values].filter(Boolean).join();
    const query = new URLSearchParams({ outputs, ...(exploration && { exploration }) });
    const begun = performance.now();
    try {
      const response = await fetch(`${path}/act?${query}`, {
        method: "POST", headers: { ...token.headers(), "Content-Type": "image/png" }, body: png,
      });
      const took = performance.now() - begun;
      const document = await response.json();
      await draw(png);
      if (!response.ok) throw new Error(document.error.message);
      $("answer").replaceChildren("The policy would take ", strong(meanings[document.action] ?? document.action));
      $("asked").textContent = `${took.toFixed(1)} ms there and back`;
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
    } catch {} // no picture: the service says what is wrong with it
  }

  $("file").addEventListener("change", () => {
    if ($("file").files.length) ask($("file").files[0]);
    $("file").value = "";
  });
  $("use").addEventListener("click", async () => ask(frame() ?? (await (await fetch("/page/sample.png")).blob())));

  let depth = 0; // of the elements that are dragged over
  const over = (change) => {
    depth = change ? depth + change : 0;
    document.body.classList.toggle("dropping", depth > 0);
  };
  addEventListener("dragenter", () => over(1));
  addEventListener("dragleave", () => over(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(0);
    if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
  });
}

function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}
