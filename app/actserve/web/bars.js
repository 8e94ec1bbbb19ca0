// One row per action: its name, a bar and its value. The bars scale from the least value of the step to the greatest.

export class Bars {
  constructor(list) {
    this.list = list;
    this.rows = [];
  }

  name(names) {
    this.rows = names.map((name) => {
      const row = document.createElement("li");
      row.innerHTML = '<span class="name"></span><span class="track"><b></b></span><span class="value"></span>';
      const [label, track, value] = row.children;
      label.append(name, document.createElement("i"));
      return { row, mark: label.lastChild, bar: track.firstChild, value };
    });
    this.list.classList.toggle("many", names.length > 9);
    this.list.replaceChildren(...this.rows.map(({ row }) => row));
  }

  // Marks `chosen`, the policy's action, and "you" at `taken` if the user took another action.
  show(chosen, values, taken = chosen) {
    const finite = (values ?? []).filter(Number.isFinite);
    const low = Math.min(...finite), high = Math.max(...finite);
    this.rows.forEach(({ row, mark, bar, value }, index) => {
      row.classList.toggle("chosen", index === chosen);
      mark.textContent = index === taken && taken !== chosen ? "you" : "";
      const share = values ? (high > low ? (values[index] - low) / (high - low) : 1) : 0;
      bar.style.transform = `scaleX(${Math.min(1, Math.max(0.015, share || 0))})`;
      value.textContent = values ? formatted(values[index]) : "";
    });
  }
}

function formatted(value) {
  if (!Number.isFinite(value)) return String(value ?? "–").replace("Infinity", "∞");
  return Math.abs(value) < 1000 ? value.toFixed(2) : value.toExponential(1);
}
