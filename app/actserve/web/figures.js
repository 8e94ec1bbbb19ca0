// The figures of the current game beside the screen: latency, batch size and rates.

import { Chart, quantile } from "./chart.js";

const $ = (id) => document.getElementById(id);
const WINDOW = 5; // marks, over which rates are measured: two seconds

export class Figures {
  constructor() {
    this.latency = new Chart($("latency"), "ms", 10, ["--bar", "--accent"], 0.1);
    this.batches = new Chart($("batches"), "items", 2, ["--accent"]);
    this.clear();
  }

  clear() {
    for (const line of [this.latency, this.batches]) line.clear();
    this.latencies = []; // milliseconds, since the last update
    this.last = null; // the head of the last picture
    this.marks = [];
  }

  add(head) {
    head.queue_us.forEach((queue, index) => this.latencies.push((queue + head.run_us[index]) / 1000));
    this.last = head;
  }

  // Milliseconds of the last step on the service.
  get newest() {
    return this.latencies.at(-1);
  }

  // To be called every half second. While nothing is played, the rates begin anew.
  update(isPlaying) {
    const { latencies, last, marks } = this;
    if (!last || !isPlaying) {
      this.marks = [];
      return;
    }
    const mark = { step: last.step, items: last.items, batches: last.batches, at: performance.now() / 1000 };
    const before = marks.at(-1) ?? mark, first = marks[0] ?? mark;
    marks.push(mark);
    if (marks.length > WINDOW) marks.shift();
    const p50 = quantile(latencies, 0.5), p99 = quantile(latencies, 0.99);
    const calls = mark.batches - before.batches;
    const mean = calls ? (mark.items - before.items) / calls : null;
    this.latency.add(p99, p50);
    this.batches.add(mean);
    if (p50 !== null) [$("p50").textContent, $("p99").textContent] = [p50.toFixed(2), p99.toFixed(2)];
    if (mean !== null) $("batch").textContent = mean.toFixed(1);
    if (mark.at > first.at) {
      $("pace").textContent = perSecond((mark.step - first.step) / (mark.at - first.at));
      $("rate").textContent = perSecond((mark.items - first.items) / (mark.at - first.at));
    }
    this.latencies = [];
  }
}

const perSecond = (rate) => Math.round(rate).toLocaleString("en");
