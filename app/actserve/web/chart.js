// A line chart of the last minute on a canvas, with a point every half second.

export const POINTS = 120;
export const POINT_MS = 500;

export class Chart {
  // `minTop`: the smallest value for the top of the scale. `colours`: CSS custom properties, one per line. `floor`: the
  // value at the bottom; above zero the scale is logarithmic, in decades.
  constructor(canvas, unit, minTop, colours, floor = 0) {
    this.floor = floor;
    this.unit = unit;
    this.canvas = canvas;
    this.minTop = minTop;
    this.colours = colours;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  clear() {
    this.lines = this.colours.map(() => Array(POINTS).fill(null));
    this.draw();
  }

  // Takes one value per line; null leaves a gap.
  add(...values) {
    this.lines.forEach((line, index) => {
      line.push(values[index]);
      line.shift();
    });
    this.draw();
  }

  draw() {
    const { canvas } = this, ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
    pen.scale(ratio, ratio);
    const most = Math.max(this.minTop, ...this.lines.flat().filter((value) => value !== null));
    const { top, ticks, share } = this.floor ? decades(this.floor, most) : linear(most);
    const y = (value) => height - 3 - (height - 15) * share(value);
    pen.strokeStyle = style.getPropertyValue("--edge");
    pen.fillStyle = style.getPropertyValue("--dim");
    pen.font = `11px ${style.fontFamily}`;
    for (const value of ticks) {
      const at = Math.round(y(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(0, at);
      pen.lineTo(width, at);
      pen.stroke();
    }
    pen.fillText(`${top} ${this.unit}`, 0, y(top) - 4);
    pen.lineJoin = "round";
    this.lines.forEach((line, index) => {
      pen.strokeStyle = style.getPropertyValue(this.colours[index]);
      pen.lineWidth = 1.75;
      pen.beginPath();
      let drawing = false;
      line.forEach((value, point) => {
        if (value === null) drawing = false;
        else {
          pen[drawing ? "lineTo" : "moveTo"]((point / (POINTS - 1)) * (width - 2), y(value));
          drawing = true;
        }
      });
      pen.stroke();
    });
  }
}

// A scale: `top`, the value at the top; `ticks`, the values of the grid lines; `share`, a value's height from 0 to 1.

function linear(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  const top = [1, 2, 5, 10].find((step) => step * power >= most * 0.999) * power;
  return { top, ticks: [0, top / 2, top], share: (value) => value / top };
}

function decades(floor, most) {
  const count = Math.ceil(Math.log10(most / floor) - 0.001);
  const ticks = Array.from({ length: count + 1 }, (_, index) => floor * 10 ** index);
  const share = (value) => Math.max(0, Math.log10(value / floor) / count);
  return { top: Number(ticks[count].toPrecision(1)), ticks, share };
}

// The quantile of `values` at `share` (0 to 1); null for no values.
export function quantile(values, share) {
  if (!values.length) return null;
  const sorted = values.toSorted((one, other) => one - other);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
