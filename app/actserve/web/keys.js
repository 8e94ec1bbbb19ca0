// Held keys and buttons -> the index of one of the game's actions.

const KEY_PARTS = { ArrowUp: "UP", ArrowDown: "DOWN", ArrowLeft: "LEFT", ArrowRight: "RIGHT", " ": "FIRE" };
const ORDER = ["UP", "DOWN", "RIGHT", "LEFT", "FIRE"]; // ALE spells "UPRIGHTFIRE"
const SIDEWAYS = { UP: "RIGHT", DOWN: "LEFT" }; // for a paddle: RIGHT moves up on Pong's screen

// The index of the action that is nearest to the held keys, or null if no key is held.
export function action(held, meanings) {
  if (!held.size) return null;
  const vertical = meanings.some((meaning) => /UP|DOWN/.test(meaning));
  const parts = new Set([...held].map((key) => (vertical ? KEY_PARTS[key] : SIDEWAYS[KEY_PARTS[key]] ?? KEY_PARTS[key])));
  for (const [one, other] of [["UP", "DOWN"], ["LEFT", "RIGHT"]]) {
    if (parts.has(one) && parts.has(other)) parts.delete(one), parts.delete(other);
  }
  const wanted = ORDER.filter((part) => parts.has(part));
  while (wanted.length) {
    const index = meanings.indexOf(wanted.join(""));
    if (index >= 0) return index;
    wanted.pop();
  }
  return Math.max(0, meanings.indexOf("NOOP"));
}

// Calls `changed(held)` whenever the set of held keys and pad buttons changes. `enabled()` returns whether to listen.
export function listen(pad, enabled, changed) {
  const held = new Set();
  const set = (key, down) => {
    if (held.has(key) === down) return;
    held[down ? "add" : "delete"](key);
    for (const button of pad.querySelectorAll("button")) button.classList.toggle("held", held.has(button.dataset.key));
    changed(held);
  };
  const release = () => [...held].forEach((key) => set(key, false));
  addEventListener("keydown", (event) => {
    const inControl = event.target.closest?.("select, input") || (event.key === " " && event.target.closest?.("button, a"));
    if (!(event.key in KEY_PARTS) || inControl || !enabled() || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    set(event.key, true);
  });
  addEventListener("keyup", (event) => set(event.key, false));
  addEventListener("blur", release);
  for (const button of pad.querySelectorAll("button")) {
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.setPointerCapture(event.pointerId);
      if (enabled()) set(button.dataset.key, true);
    });
    for (const kind of ["pointerup", "pointercancel"]) button.addEventListener(kind, () => set(button.dataset.key, false));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }
}
