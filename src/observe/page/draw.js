// Everything that comes from outside gets into the document here, and only as text.

const SVG = "http://www.w3.org/2000/svg";

/** How bad it is: a word, a shape and only then a colour. */
const LEVELS = {
  ok: { word: "OK", path: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM4.5 8.2 7 10.7l4.6-5.2", closed: false },
  busy: { word: "UNDER WAY", path: "M13.5 8A5.5 5.5 0 1 1 11.6 3.8M12 1v3.4H8.6", closed: false },
  warn: { word: "LOOK AT IT", path: "M8 1.5 15 14.5H1zM8 6v4M8 12.2v.3", closed: false },
  bad: { word: "ACT NOW", path: "M5 1h6l4 4v6l-4 4H5l-4-4V5zM5.4 5.4l5.2 5.2M10.6 5.4l-5.2 5.2", closed: false },
};

const byId = (id) => document.getElementById(id);

/** An element with a class and children; strings become text. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** An element of a drawing. */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The shape of a level; the word stands beside it, so it is none of a screen reader's business. */
function shape(level) {
  const path = draw("path", { d: LEVELS[level].path });
  return draw("svg", { viewBox: "0 0 16 16", class: "shape", "aria-hidden": "true", focusable: "false" }, path);
}

/** Sets the text of an element, if it is another one: what a person has marked stays marked. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A moment: UTC to read, the reader's own time to point at. */
function time(at, today) {
  const element = make("time", "", moment(at, today));
  element.dateTime = at;
  element.title = new Date(at).toLocaleString();
  return element;
}

/** A sentence; what stands in it between backticks is code. */
function sentence(text) {
  return String(text).split("`").map((part, index) => (index % 2 === 1 ? make("code", "", part) : part));
}

/** Shows what `makeChildren` makes of `facts` in `element`, anew only where the facts are others. */
function show(element, facts, makeChildren) {
  const known = JSON.stringify(facts);
  if (element.shown === known) return;
  element.shown = known;
  element.replaceChildren(...makeChildren());
}

/** What a cell shows: a string, or `{text, level, note, since, at, bar, code}`, or several of them. */
function pieces(cell, today) {
  if (Array.isArray(cell)) return cell.flatMap((one) => pieces(one, today));
  const piece = cell !== null && typeof cell === "object" ? cell : { text: cell };
  const made = [];
  const text = piece.at ? time(piece.at, today) : String(piece.text ?? "");
  if (piece.level) {
    made.push(make("span", `tag ${piece.level}`, shape(piece.level), " ", text));
  } else if (text !== "") {
    made.push(piece.code ? make("code", "", text) : make("span", "", ...(piece.at ? [text] : sentence(text))));
  }
  if (known(piece.bar)) {
    const bar = make("progress");
    bar.max = 100;
    bar.value = piece.bar;
    bar.setAttribute("aria-label", `${piece.bar} %`);
    made.push(bar);
  }
  if (piece.note) made.push(make("span", "note", piece.note));
  if (piece.since) made.push(make("span", "note", "since ", time(piece.since, today)));
  return made;
}

/** A table that keeps its rows and moves, fills and drops only what has changed.
 *
 * `columns` are `{head, cell, kind}` with `cell(row)` as `pieces` takes it; `key(row)` tells the rows apart;
 * of more than `limit` rows the rest waits for a press of the button; narrower than `fits` pixels, rows are cards. */
class Grid {
  constructor(place, { caption, columns, key, limit = 30, none, fits = columns.length * 110 }) {
    Object.assign(this, { columns, key, limit, none, rows: new Map(), all: false, last: [] });
    // Roles are said again: narrow screens lay the rows out as blocks, which takes them away.
    const heads = columns.map((column) => {
      const head = make("th", column.kind ?? "", column.head);
      head.scope = "col";
      head.setAttribute("role", "columnheader");
      return head;
    });
    const headRow = make("tr", "", ...heads);
    headRow.setAttribute("role", "row");
    this.body = make("tbody");
    this.table = make("table", "", make("caption", "unseen", caption), make("thead", "", headRow), this.body);
    this.table.setAttribute("role", "table");
    for (const part of [this.table.tHead, this.body]) part.setAttribute("role", "rowgroup");
    this.empty = make("p", "none", none);
    this.more = make("button", "more");
    this.more.type = "button";
    this.more.addEventListener("click", () => {
      this.all = !this.all;
      this.fill(this.last, this.today);
    });
    place.append(this.empty, this.table, this.more);
    new ResizeObserver(([entry]) => this.table.classList.toggle("cards", entry.contentRect.width < fits)).observe(place);
  }

  /** Shows these rows in this order. */
  fill(rows, today) {
    this.last = rows;
    this.today = today;
    const shown = this.all ? rows : rows.slice(0, this.limit);
    this.empty.hidden = rows.length > 0;
    this.table.hidden = rows.length === 0;
    this.more.hidden = rows.length <= this.limit;
    say(this.more, this.all ? `Show the first ${count(this.limit)} only` : `Show all ${count(rows.length)}`);
    const kept = new Map();
    let place = this.body.firstChild;
    for (const row of shown) {
      const key = this.key(row);
      // Two rows of one key would be one: the second is told apart by its place.
      const own = kept.has(key) ? `${key} ${kept.size}` : key;
      const line = this.rows.get(own) ?? this.line();
      kept.set(own, line);
      this.columns.forEach((column, index) => {
        const cell = column.cell(row);
        show(line.cells[index], [cell, today?.slice(0, 10)], () => pieces(cell, today));
      });
      if (line === place) place = line.nextSibling;
      else this.body.insertBefore(line, place);
    }
    for (const [key, line] of this.rows) {
      if (kept.get(key) !== line) line.remove();
    }
    this.rows = kept;
  }

  line() {
    const cells = this.columns.map((column, index) => {
      // The first cell names the row.
      const cell = make(index === 0 ? "th" : "td", `cell ${column.kind ?? ""}`.trim());
      if (index === 0) cell.scope = "row";
      cell.dataset.head = column.head;
      cell.setAttribute("role", index === 0 ? "rowheader" : "cell");
      return cell;
    });
    const line = make("tr", "", ...cells);
    line.setAttribute("role", "row");
    return line;
  }
}
