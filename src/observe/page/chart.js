// Lines of the last hour.

const HOUR = 3600;
const STEPS_OF_TIME = [0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800];

/** The smallest round number that nothing of `most` exceeds. */
function roof(most, isTime) {
  if (isTime) return STEPS_OF_TIME.find((step) => step >= most) ?? most;
  let step = 1;
  while (step < most) {
    const lead = Number(String(step)[0]);
    step = lead === 2 ? step * 2.5 : step * 2;
  }
  return step;
}

/** A chart of one or two lines over the last hour. `lines` are `{key, label}`; where `unknown(point)` holds,
 * the ground is hatched and said to be unknown. */
class Chart {
  constructor(figure, { title, lines, isTime, unknown, silent }) {
    Object.assign(this, { title, lines, isTime, unknown, silent });
    this.words = make("p", "note");
    this.picture = draw("svg", { class: "chart", role: "img" });
    const keys = lines.length < 2 ? [] : lines.map((line, index) => {
      const sample = draw("svg", { viewBox: "0 0 24 4", class: "sample", "aria-hidden": "true" },
        draw("path", { d: "M0 2H24", class: `trace t${index}` }));
      return make("span", "key", sample, line.label);
    });
    figure.append(make("figcaption", "", make("h3", "", title), ...keys), this.words, this.picture);
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", () => this.pointed(undefined));
  }

  format(value) {
    return this.isTime ? span(value) : rate(value);
  }

  /** Shows the points up to `at`. */
  fill(history, at) {
    this.at = new Date(at).getTime() / 1000;
    this.step = history?.stepSeconds ?? 10;
    this.points = (history?.points ?? [])
      .map((point) => ({ ...point, second: new Date(point.at).getTime() / 1000 }))
      .filter((point) => point.second > this.at - HOUR - this.step);
    this.tell();
    this.paint();
  }

  /** Says in words what the picture shows. */
  tell() {
    const first = this.lines[0].key;
    const last = this.points.at(-1);
    const valued = this.points.filter((point) => known(point[first]));
    let words = "nothing yet";
    if (last) {
      words = known(last[first]) ? `now ${this.format(last[first])}` : `${this.silent} now`;
      if (valued.length > 0) {
        const most = valued.reduce((a, b) => (b[first] > a[first] ? b : a));
        words += ` · most ${this.format(most[first])} at ${moment(most.at, this.at * 1000).slice(-8, -3)}`;
      }
    }
    this.told = words;
    say(this.words, words);
    this.picture.setAttribute("aria-label", `${this.title}, the last hour: ${words}`);
  }

  x(second) {
    return this.left + (this.width - this.left - 4) * (1 - (this.at - second) / HOUR);
  }

  y(value) {
    return 6 + (this.base - 6) * (1 - value / this.top);
  }

  paint() {
    this.width = Math.max(200, this.picture.clientWidth || 300);
    this.left = 46;
    this.base = 96;
    const values = this.points.flatMap((point) => this.lines.map((line) => point[line.key])).filter(known);
    this.top = roof(Math.max(this.isTime ? 0.5 : 1, ...values), this.isTime);
    this.picture.setAttribute("viewBox", `0 0 ${this.width} 118`);
    const parts = [...this.ground(), ...this.blanks()];
    this.lines.forEach((line, index) => {
      parts.push(draw("path", { d: this.path(line.key), class: `trace t${index}` }));
    });
    this.cursor = draw("path", { d: "", class: "cursor" });
    this.picture.replaceChildren(...parts, this.cursor);
  }

  /** The lines of the ground with their figures, and the times below. */
  ground() {
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const y = this.y(this.top * share);
      parts.push(draw("path", { d: `M${this.left} ${y}H${this.width - 4}`, class: "ground" }));
      const label = this.isTime ? brief(this.top * share) : count(this.top * share);
      parts.push(draw("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, share === 0 ? "0" : label));
    }
    for (const [minutes, anchor] of [[60, "start"], [30, "middle"], [0, "end"]]) {
      const text = minutes === 0 ? "now" : `−${minutes} min`;
      parts.push(draw("text", { x: this.x(this.at - minutes * 60), y: 113, "text-anchor": anchor }, text));
    }
    return parts;
  }

  /** Where nobody knows: said by a hatch and not by an absent line alone. */
  blanks() {
    if (!this.unknown) return [];
    const parts = [draw("defs", {}, draw("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      draw("path", { d: "M0 0V6", class: "hatch" })))];
    let begin;
    const close = (end) => {
      const [from, to] = [Math.max(this.left, this.x(begin)), this.x(end)];
      parts.push(draw("rect", { x: from, y: 6, width: Math.max(1, to - from), height: this.base - 6, fill: "url(#hatch)" }));
      if (to - from > 60) parts.push(draw("text", { x: (from + to) / 2, y: 52, "text-anchor": "middle", class: "over" }, "unknown"));
      begin = undefined;
    };
    for (const point of this.points) {
      if (this.unknown(point)) begin ??= point.second - this.step;
      else if (begin !== undefined) close(point.second - this.step);
    }
    if (begin !== undefined) close(this.points.at(-1).second);
    return parts;
  }

  /** The line of a value, broken where it is absent or the points are. */
  path(key) {
    let path = "";
    let before;
    for (const point of this.points) {
      if (!known(point[key])) {
        before = undefined;
        continue;
      }
      const [x, y] = [Math.max(this.left, this.x(point.second)).toFixed(1), this.y(point[key]).toFixed(1)];
      const joins = before !== undefined && point.second - before < this.step * 2.5;
      // A point alone is a short stroke, so that it is seen.
      path += joins ? `L${x} ${y}` : `M${(x - 1.5).toFixed(1)} ${y}H${x}`;
      before = point.second;
    }
    return path;
  }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const nearest = this.points.reduce(
      (best, point) => (best === undefined || Math.abs(this.x(point.second) - x) < Math.abs(this.x(best.second) - x) ? point : best),
      undefined,
    );
    this.pointed(nearest);
  }

  pointed(point) {
    if (!point) {
      this.cursor?.setAttribute("d", "");
      say(this.words, this.told ?? "");
      return;
    }
    this.cursor.setAttribute("d", `M${Math.max(this.left, this.x(point.second))} 6V${this.base}`);
    const values = this.lines.map((line) => {
      const value = known(point[line.key]) ? this.format(point[line.key]) : this.silent;
      return this.lines.length < 2 ? value : `${line.label} ${value}`;
    });
    say(this.words, `${moment(point.at, this.at * 1000)}: ${values.join(", ")}`);
  }
}
