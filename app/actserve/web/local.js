// A policy that acts in this browser: a bundle that the service offers (`actserve serve --bundles`).

import { quantile } from "./chart.js";
import * as token from "./token.js";

const WIDTH = 160, HEIGHT = 210;

// The module's path of the bundle of this version, or undefined.
export async function offered(name, version) {
  const { bundles } = await (await fetch("bundles", { headers: token.headers() })).json();
  return bundles.find((bundle) => bundle.name === name && bundle.version === version)?.module;
}

export class LocalPolicy {
  static async open(module) {
    const { Policy } = await import(new URL(module, location.href));
    return new LocalPolicy(await Policy.load());
  }

  constructor(policy) {
    this.policy = policy;
    this.pen = new OffscreenCanvas(WIDTH, HEIGHT).getContext("2d", { willReadFrequently: true });
  }

  // Begins an episode, with the seed and the exploration of the service's own.
  begin(options) {
    this.episode = this.policy.episode(options);
    this.steps = this.same = 0;
    this.here = []; // milliseconds of the latest actions
    this.there = [];
  }

  // The action for a screen, where the service would take `proposed` after so many milliseconds.
  async act(bitmap, proposed, serviceMs) {
    const screen = this.pixels(bitmap);
    const started = performance.now();
    const action = await this.episode.act(screen);
    this.here.push(performance.now() - started);
    if (serviceMs !== undefined) this.there.push(serviceMs);
    for (const times of [this.here, this.there]) if (times.length > 100) times.shift();
    this.steps += 1;
    this.same += action === proposed;
    return action;
  }

  // What the page says about the episode.
  get summary() {
    const [here, there] = [this.here, this.there].map((times) => quantile(times, 0.5)?.toFixed(2) ?? "–");
    const steps = this.steps.toLocaleString("en");
    return { here, there, same: `${this.same.toLocaleString("en")} of ${steps}`, differs: this.same < this.steps };
  }

  // RGB, row by row.
  pixels(bitmap) {
    this.pen.drawImage(bitmap, 0, 0);
    const { data } = this.pen.getImageData(0, 0, WIDTH, HEIGHT);
    const screen = new Uint8Array(3 * WIDTH * HEIGHT);
    for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
      screen[to] = data[from];
      screen[to + 1] = data[from + 1];
      screen[to + 2] = data[from + 2];
    }
    return screen;
  }
}
