// The page: what is chosen, the game that is on, and the figures beside it.

import * as ask from "/page/ask.js";
import { Bars } from "/page/bars.js";
import { Chart, POINT_MS, quantile } from "/page/chart.js";
import { Game } from "/page/game.js";
import * as keys from "/page/keys.js";
import * as token from "/page/token.js";

const $ = (id) => document.getElementById(id);
const pen = $("screen").getContext("2d");
const bars = new Bars($("actions"));
const latency = new Chart($("latency"), "ms", 10, ["--bar", "--accent"], 0.1);
const batches = new Chart($("batches"), "items", 2, ["--accent"]);

let described = null; // GET /policies/{name} of the chosen policy
let game = null; // the one that is on
let frame = null; // the last frame, a PNG
let meanings = []; // of the actions
let playable = false;

const json = async (path) => {
  const response = await fetch(path, { headers: token.headers() });
  const document = await response.json();
  $("token").hidden = response.status !== 401;
  if (!response.ok) throw new Error(document.error?.message ?? response.statusText);
  return document;
};

// What is chosen

const options = (select, values) => select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));

async function describe() {
  described = await json(`/policies/${$("policy").value}`);
  const { manifest, version, runtime, versions } = described;
  options($("version"), versions.toReversed().map((number) => [number, number === version ? `${number} (live)` : number]));
  $("version").value = version;
  const programs = Object.keys(manifest?.programs ?? {});
  options($("runtime"), programs.map((name) => [name, name === runtime ? `${name} (served)` : name]));
  $("runtime").value = runtime;
  options($("exploration"), (manifest?.signature.exploration ?? []).map((name) => [name, name]));
  for (const id of ["version", "runtime", "exploration"]) $(id).disabled = $(id).options.length < 2;
  $("served").textContent = [manifest?.environment?.id, `${described.name}@${version}`, runtime].filter(Boolean).join(" · ");
  meanings = manifest?.environment?.actions.map(({ meaning }) => meaning) ?? [];
  bars.name(meanings);
  $("start").disabled = !playable || !meanings.length;
  if (!playable) return;
  if (!manifest) $("note").textContent = `No version of ${described.name} can be served.`;
  else if (!meanings.length) $("note").textContent = `${described.name} was not trained on an Atari game.`;
  else $("note").textContent = `${described.name} plays ${manifest.environment.id}: live, on this service, as it sees it.`;
}

function values() {
  const outputs = described?.manifest?.signature.outputs ?? [];
  return outputs.slice(1).find(({ shape }) => shape.length === 1 && shape[0] === meanings.length)?.name;
}

const chosen = () => ({
  policy: $("policy").value,
  version: $("version").value,
  // As it is served, unless somebody wants another: the same version, whatever its runtime.
  runtime: $("runtime").value === described.runtime ? "" : $("runtime").value,
  exploration: $("exploration").value,
});

// The game that is on

const WINDOW = 5; // marks: two seconds, over which rates are taken
const meter = { took: [], last: null, marks: [] };

function start() {
  game?.stop();
  const command = { held: held(), speed: Number($("speed").value), paused: document.hidden };
  for (const line of [latency, batches]) line.clear();
  Object.assign(meter, { took: [], last: null, marks: [] });
  $("score").textContent = "0";
  $("verdict").textContent = $("note").textContent = "";
  $("start").disabled = true;
  $("start").textContent = "starting";
  game = new Game(chosen(), command, { hello, picture, end });
}

function hello({ policy, version, runtime, environment, seed, values }) {
  meanings = environment.actions.map(({ meaning }) => meaning);
  bars.name(meanings);
  $("values").textContent = values?.replaceAll("_", " ") ?? "";
  $("served").textContent = `${environment.id} · ${policy}@${version} · ${runtime} · seed ${seed}`;
  $("veil").hidden = true;
  $("pad").hidden = false;
  for (const id of ["pause", "stop", "manual"]) $(id).disabled = false;
  $("pause").textContent = "Pause";
  $("use").textContent = "use this frame";
  $("screen").focus(); // and not a button that the space bar would press
}

function picture(head, bitmap, png) {
  frame = png;
  pen.drawImage(bitmap, 0, 0);
  bars.show(head.proposed, head.values, head.taken);
  $("yours").hidden = game.command.held === null;
  $("step").textContent = head.step.toLocaleString("en");
  if (head.rewards.length) {
    $("score").textContent = signed(head.score);
    $("score").classList.remove("scored");
    void $("score").offsetWidth; // so that the animation begins again
    $("score").classList.add("scored");
  }
  head.queue_us.forEach((queue, index) => meter.took.push((queue + head.run_us[index]) / 1000));
  meter.last = head;
}

function end({ over, error }) {
  game = null;
  $("veil").hidden = false;
  $("start").disabled = false;
  $("start").textContent = over ? "Play again" : "Play";
  $("verdict").textContent = over ? `Game over: ${$("score").textContent}` : "";
  $("note").textContent = error ?? (over ? "" : "The connection is gone.");
  $("pad").hidden = $("yours").hidden = true;
  for (const id of ["pause", "stop", "manual"]) $(id).disabled = true;
}

function stop() {
  game?.stop();
  end({ over: false, error: "" });
}

const signed = (score) => score.toLocaleString("en").replace("-", "−");

// What is counted, every half second

function count() {
  const { took, last, marks } = meter;
  if (!last || !game || game.command.paused) {
    meter.marks = [];
    return;
  }
  const mark = { step: last.step, items: last.items, batches: last.batches, at: performance.now() / 1000 };
  const before = marks.at(-1) ?? mark, first = marks[0] ?? mark;
  marks.push(mark);
  if (marks.length > WINDOW) marks.shift();
  const p50 = quantile(took, 0.5), p99 = quantile(took, 0.99);
  const calls = mark.batches - before.batches;
  const mean = calls ? (mark.items - before.items) / calls : null;
  latency.add(p99, p50);
  batches.add(mean);
  if (p50 !== null) [$("p50").textContent, $("p99").textContent] = [p50.toFixed(2), p99.toFixed(2)];
  if (mean !== null) $("batch").textContent = mean.toFixed(1);
  if (mark.at > first.at) {
    $("pace").textContent = perSecond((mark.step - first.step) / (mark.at - first.at));
    $("rate").textContent = perSecond((mark.items - first.items) / (mark.at - first.at));
  }
  meter.took = [];
}

const perSecond = (rate) => Math.round(rate).toLocaleString("en");

// What it is told

const listening = () => game !== null;
let fingers = new Set();

const manual = () => $("manual").getAttribute("aria-pressed") === "true";

function held() {
  const taken = keys.action(fingers, meanings);
  return taken === null && manual() ? Math.max(0, meanings.indexOf("NOOP")) : taken;
}

function toggleManual() {
  $("manual").setAttribute("aria-pressed", String(!manual()));
  game?.tell({ held: held() });
  $("screen").focus();
}

function togglePause() {
  game?.tell({ paused: !game.command.paused });
  $("pause").textContent = game?.command.paused ? "Go on" : "Pause";
}

async function begin() {
  try {
    await offer();
  } catch (error) {
    $("served").textContent = "";
    $("note").textContent = $("token").hidden ? error.message : "This service asks for a token.";
  }
}

async function offer() {
  const { playable: can, reason } = await json("/games");
  playable = can;
  $("note").textContent = can ? "" : `${reason[0].toUpperCase()}${reason.slice(1)}. A PNG of a screen can be asked about all the same.`;
  const { default: first, policies } = await json("/policies");
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
  game?.tell({ speed: Number($("speed").value) });
  $("screen").focus(); // or the arrow keys would go on choosing
});
$("choice").addEventListener("submit", (event) => event.preventDefault());
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token.keep($("secret").value.trim());
  $("secret").value = "";
  begin();
});
$("choice").addEventListener("change", async ({ target }) => {
  const on = game !== null;
  if (on) stop();
  try {
    if (target.id === "policy") await describe();
    if (on) start();
  } catch (error) {
    $("note").textContent = error.message;
  }
});
document.addEventListener("visibilitychange", () => {
  if (!game || $("pause").textContent !== "Pause") return;
  game.tell({ paused: document.hidden });
});
addEventListener("pagehide", () => game && stop()); // a browser may keep the page, and the socket with it
keys.listen($("pad"), listening, (now) => {
  fingers = now;
  game?.tell({ held: held() });
});
ask.install(
  () => ({
    // By default the default: before the policies are known, a screen can be asked about already.
    path: $("version").value && `/policies/${$("policy").value}/versions/${$("version").value}`, meanings, values: values(),
    exploration: $("exploration").value,
  }),
  () => frame,
);
setInterval(count, POINT_MS);
begin();
