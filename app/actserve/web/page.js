// The page: the choice of a policy, the current game, and its figures.

import * as ask from "./ask.js";
import { Bars } from "./bars.js";
import { POINT_MS } from "./chart.js";
import { Figures } from "./figures.js";
import { Game } from "./game.js";
import * as keys from "./keys.js";
import { LocalPolicy, offered } from "./local.js";
import * as token from "./token.js";

const $ = (id) => document.getElementById(id);
const pen = $("screen").getContext("2d");
const bars = new Bars($("actions"));
const figures = new Figures();

let described = null; // GET /policies/{name} of the chosen policy
let game = null; // the current game
let local = null; // the policy that acts in this browser, where that is chosen
let bundle; // the module of the chosen version for this browser, if there is one
let frame = null; // the PNG of the last frame
let meanings = []; // the actions' names
let playable = false; // whether the service can run games

const json = async (path) => {
  const response = await fetch(path, { headers: token.headers() });
  const document = await response.json();
  $("token").hidden = response.status !== 401;
  if (!response.ok) throw new Error(document.error?.message ?? response.statusText);
  return document;
};

// The choice of a policy

const options = (select, values) => select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));

async function describe() {
  described = await json(`policies/${$("policy").value}`);
  const { manifest, version, runtime, versions } = described;
  options($("version"), versions.toReversed().map((number) => [number, number === version ? `${number} (live)` : number]));
  $("version").value = version;
  const programs = Object.keys(manifest?.programs ?? {});
  options($("runtime"), programs.map((name) => [name, name === runtime ? `${name} (served)` : name]));
  $("runtime").value = runtime;
  options($("exploration"), (manifest?.signature.exploration ?? []).map((name) => [name, name]));
  for (const id of ["version", "runtime", "exploration"]) $(id).disabled = $(id).options.length < 2;
  $("served").textContent = [manifest?.environment?.id, `${described.name}@${version}`, runtime].filter(Boolean).join(" · ");
  meanings = manifest?.environment?.actions?.map(({ meaning }) => meaning) ?? [];
  bars.name(meanings);
  $("start").disabled = !playable || !meanings.length;
  await offer();
  if (!playable) return;
  if (!manifest) $("note").textContent = `No version of ${described.name} can be served.`;
  else if (!meanings.length) $("note").textContent = `${described.name} was not trained on an Atari game.`;
  else $("note").textContent = `${described.name} plays ${manifest.environment.id}, live on this service.`;
}

// Offers to act in this browser if the service has a bundle of the chosen version.
async function offer() {
  bundle = await offered(described.name, Number($("version").value));
  $("place").hidden = !bundle;
  if (!bundle) $("acts").value = "service";
}

// The name of the output with one value per action, if there is one.
function values() {
  const outputs = described?.manifest?.signature.outputs ?? [];
  return outputs.slice(1).find(({ shape }) => shape.length === 1 && shape[0] === meanings.length)?.name;
}

const chosen = () => ({
  policy: $("policy").value,
  version: $("version").value,
  // Empty for the live runtime: then the game plays the policy as it is served.
  runtime: $("runtime").value === described.runtime ? "" : $("runtime").value,
  exploration: $("exploration").value,
  acts: $("acts").value === "browser" ? "browser" : "",
});

// The current game

async function start() {
  game?.stop();
  const command = { held: $("acts").value === "browser" ? null : held(), speed: Number($("speed").value), paused: document.hidden };
  figures.clear();
  $("score").textContent = "0";
  $("verdict").textContent = $("note").textContent = "";
  $("start").disabled = true;
  $("start").textContent = "starting";
  $("local").hidden = $("acts").value !== "browser";
  local = null;
  if (!$("local").hidden) {
    $("note").textContent = "Loading the policy into this browser.";
    try {
      local = await LocalPolicy.open(bundle);
    } catch (error) {
      end({ over: false, error: error.message });
      return;
    }
    $("note").textContent = "";
  }
  game = new Game(chosen(), command, { hello, picture, end });
}

function hello({ policy, version, runtime, environment, seed, values, exploration }) {
  local?.begin({ seed, exploration });
  meanings = environment.actions.map(({ meaning }) => meaning);
  bars.name(meanings);
  $("values").textContent = values?.replaceAll("_", " ") ?? "";
  $("served").textContent = `${environment.id} · ${policy}@${version} · ${runtime} · seed ${seed}`;
  $("veil").hidden = true;
  $("pad").hidden = false;
  for (const id of ["pause", "stop", "manual"]) $(id).disabled = false;
  $("pause").textContent = "Pause";
  $("use").textContent = "use this frame";
  $("screen").focus(); // so that the space bar presses no button
}

function picture(head, bitmap, png) {
  frame = png;
  pen.drawImage(bitmap, 0, 0);
  if (local && !head.over) answer(head, bitmap);
  else bars.show(head.proposed, head.values, head.taken);
  $("yours").hidden = held() === null;
  $("step").textContent = head.step.toLocaleString("en");
  if (head.rewards.length) {
    $("score").textContent = signed(head.score);
    $("score").classList.remove("scored");
    void $("score").offsetWidth; // restarts the animation
    $("score").classList.add("scored");
  }
  figures.add(head);
}

// Acts in this browser, and tells the service which action to take.
async function answer(head, bitmap) {
  const playing = game;
  try {
    const action = await local.act(bitmap, head.proposed, figures.newest);
    if (playing !== game) return;
    const taken = held() ?? action;
    playing.send({ held: taken, step: head.step });
    bars.show(action, head.values, taken);
    const { here, there, same, differs } = local.summary;
    [$("here").textContent, $("there").textContent, $("same").textContent] = [here, there, same];
    $("same").classList.toggle("differs", differs);
  } catch (error) {
    game?.stop();
    end({ over: false, error: error.message });
  }
}

function end({ over, error }) {
  game = null;
  $("veil").hidden = false;
  $("start").disabled = false;
  $("start").textContent = over ? "Play again" : "Play";
  $("verdict").textContent = over ? `Game over: ${$("score").textContent}` : "";
  $("note").textContent = error ?? (over ? "" : "The connection was lost.");
  $("pad").hidden = $("yours").hidden = true;
  for (const id of ["pause", "stop", "manual"]) $(id).disabled = true;
}

function stop() {
  game?.stop();
  end({ over: false, error: "" });
}

const signed = (score) => score.toLocaleString("en").replace("-", "−");

// The controls

const listening = () => game !== null;
let heldKeys = new Set();

const manual = () => $("manual").getAttribute("aria-pressed") === "true";

function held() {
  const action = keys.action(heldKeys, meanings);
  return action === null && manual() ? Math.max(0, meanings.indexOf("NOOP")) : action;
}

function toggleManual() {
  $("manual").setAttribute("aria-pressed", String(!manual()));
  hold();
  $("screen").focus();
}

// Where this browser acts, its next action says what is held.
function hold() {
  if (!local) game?.send({ held: held() });
}

function togglePause() {
  game?.send({ paused: !game.command.paused });
  $("pause").textContent = game?.command.paused ? "Resume" : "Pause";
}

async function begin() {
  try {
    await loadPolicies();
  } catch (error) {
    $("served").textContent = "";
    $("note").textContent = $("token").hidden ? error.message : "This service requires a token.";
  }
}

async function loadPolicies() {
  const games = await json("games");
  const { reason } = games;
  playable = games.playable;
  $("note").textContent = playable ? "" : `${reason[0].toUpperCase()}${reason.slice(1)}. You can still try a PNG of a screen.`;
  const { default: first, policies, recording } = await json("policies");
  $("recording").hidden = !recording;
  $("recording").textContent = recording?.stopped
    ? `Recording has stopped: ${recording.stopped}`
    : "This service records what its policies see and do.";
  if (!policies.length) {
    $("note").textContent = "No policy is served yet.";
    setTimeout(begin, 1000);
    return;
  }
  options($("policy"), policies.map(({ name }) => [name, name]));
  $("policy").value = first ?? policies[0].name;
  await describe();
}

$("start").addEventListener("click", start);
$("stop").addEventListener("click", stop);
$("pause").addEventListener("click", togglePause);
$("manual").addEventListener("click", toggleManual);
$("speed").addEventListener("change", () => {
  game?.send({ speed: Number($("speed").value) });
  $("screen").focus(); // so that the arrow keys no longer change the speed
});
$("choice").addEventListener("submit", (event) => event.preventDefault());
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token.keep($("secret").value.trim());
  $("secret").value = "";
  begin();
});
$("choice").addEventListener("change", async ({ target }) => {
  const wasPlaying = game !== null;
  if (wasPlaying) stop();
  try {
    if (target.id === "policy") await describe();
    if (target.id === "version") await offer();
    if (wasPlaying) await start();
  } catch (error) {
    $("note").textContent = error.message;
  }
});
document.addEventListener("visibilitychange", () => {
  if (!game || $("pause").textContent !== "Pause") return;
  game.send({ paused: document.hidden });
});
addEventListener("pagehide", () => game && stop()); // a browser may cache the page with its socket open
keys.listen($("pad"), listening, (now) => {
  heldKeys = now;
  hold();
});
ask.install(
  () => ({
    // Empty until the policies are loaded: then `act` asks the default policy.
    path: $("version").value && `policies/${$("policy").value}/versions/${$("version").value}/`, meanings, values: values(),
    exploration: $("exploration").value,
  }),
  () => frame,
);
setInterval(() => figures.update(game !== null && !game.command.paused), POINT_MS);
begin();
