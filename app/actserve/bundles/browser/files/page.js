// The page of a bundle: verifies the golden samples, and measures the time of one action.
//
// ?threads=N runs the program with N threads. ?report=PATH posts the result there, for `actserve verify --bundle`.
import { goldenSamples, slices, verify } from "./golden.js";
import { Policy } from "./policy.js";

const WARM_UP = 20;
const ACTIONS = 200;
const BARS = 60;
const ask = new URLSearchParams(location.search);
const at = (id) => document.getElementById(id);

async function main() {
  const threads = Number(ask.get("threads") ?? 1);
  if (threads > 1 && !globalThis.crossOriginIsolated) {
    throw new Error("expected a page that is cross-origin isolated, for more threads than one");
  }
  const policy = await Policy.load({ threads });
  show(policy);
  at("verdict").textContent = "running the golden samples";
  const golden = await goldenSamples(policy);
  const wrong = await verify(policy, golden);
  if (wrong.length) throw new Error(wrong.join("; "));
  at("verdict").textContent = `${golden.samples} golden samples are repeated`;
  at("verdict").className = "right";
  at("detail").textContent = "One by one and in batches, within the tolerance of the certificate.";
  const times = await measure(policy, golden);
  draw(times);
  return { samples: golden.samples, threads, call_ms: median(times) };
}

function show(policy) {
  document.title = at("name").textContent = policy.label;
  const body = at("signature").tBodies[0];
  const rows = [["takes", policy.observations], ["state", policy.state.map(({ spec }) => spec)], ["gives", policy.outputs]];
  for (const [title, specs] of rows) {
    for (const spec of specs) {
      const row = body.insertRow();
      for (const text of [title, spec.name, String(spec)]) row.insertCell().textContent = text;
    }
  }
}

// Milliseconds of each of the actions on the first golden sample.
async function measure(policy, { inputs }) {
  const one = slices(policy.inputs, inputs, 0, 1);
  const times = [];
  for (let i = 0; i < WARM_UP + ACTIONS; i++) {
    const start = performance.now();
    await policy.run(one, 1);
    if (i >= WARM_UP) times.push(performance.now() - start);
  }
  return times;
}

function median(times) {
  return times.toSorted((a, b) => a - b)[Math.floor(times.length / 2)];
}

function draw(times) {
  const sorted = times.toSorted((a, b) => a - b);
  const p99 = sorted[Math.floor(0.99 * sorted.length)];
  at("latency").textContent = `${median(times).toFixed(2)} ms (median of ${times.length}), p99 ${p99.toFixed(2)} ms`;
  const bins = Array(BARS).fill(0);
  for (const time of times) bins[Math.min(BARS - 1, Math.floor((time / p99) * (BARS - 1)))] += 1;
  const most = Math.max(...bins);
  const [width, height, base] = [600 / BARS, 110, 115];
  at("times").innerHTML = bins.map((count, i) => {
    const tall = (count / most) * height;
    return `<rect x="${i * width}" y="${base - tall}" width="${width - 1}" height="${tall}"></rect>`;
  }).join("") + `<text x="0" y="134">0</text><text x="600" y="134" text-anchor="end">${p99.toFixed(2)} ms</text>`;
}

function report(found) {
  const path = ask.get("report");
  return path && fetch(path, { method: "POST", body: JSON.stringify(found) });
}

main().then(
  (found) => report({ ...found, browser: navigator.userAgent }),
  (error) => {
    at("verdict").textContent = `not verified: ${error.message}`;
    at("verdict").className = "wrong";
    return report({ error: error.message });
  },
);
