// Asking, and saying so when nobody answers.

const EVERY_MS = 2000;
const SLOWEST_MS = 30000;
const PATIENCE_MS = 10000;

const page = {
  shards: new Shards(),
  lists: Object.entries(LISTS).map(([id, list]) => [list, new Grid(byId(id), list)]),
  charts: [
    new Chart(byId("chart-recovery"), {
      title: "Recovery point", isTime: true, silent: "unknown",
      lines: [{ key: "provenSeconds", label: "proven" }, { key: "estimatedSeconds", label: "estimated" }],
      unknown: (point) => !known(point.provenSeconds),
    }),
    new Chart(byId("chart-lag"), { title: "Lag", isTime: true, silent: "nothing applied", lines: [{ key: "lagSeconds", label: "lag" }] }),
    new Chart(byId("chart-rate"), { title: "Records a second", isTime: false, silent: "unknown", lines: [{ key: "recordsPerSecond", label: "records" }] }),
  ],
};

const line = { heardAt: undefined, since: undefined, wait: EVERY_MS, timer: undefined, asking: false, view: undefined };

const CLOCKS = { source: "the source's", replica: "the replica's", host: "this worker's" };

function showTop(view) {
  say(byId("group"), view.group);
  const active = view.active && view.active !== view.here ? `, active is ${view.active}` : "";
  const epoch = known(view.epoch) ? `, epoch ${view.epoch}` : "";
  say(byId("seen-from"), `seen from ${view.here}${active}${epoch}`);
  const worker = view.worker;
  const up = worker ? secondsBetween(worker.since, view.at) : undefined;
  say(byId("answering"), worker ? `worker ${host(worker.id)}, ${worker.version}, up ${span(up)}` : "");
  const error = known(view.clockErrorSeconds) ? brief(view.clockErrorSeconds) : "?";
  const whose = CLOCKS[view.clock] ? ` by ${CLOCKS[view.clock]} clock` : "";
  show(byId("clock"), [view.at, error, whose], () => [time(view.at, view.at), ` UTC ± ${error}${whose}`]);
}

function showHeadline(view) {
  const headline = view.headline;
  const level = LEVELS[headline.level] ? headline.level : "warn";
  byId("headline").className = `banner headline ${level}`;
  show(byId("headline-level"), level, () => [shape(level), ` ${LEVELS[level].word}`]);
  say(byId("headline-text"), headline.text);
  show(byId("headline-next"), headline.next, () => (headline.next ? sentence(`What to do: ${headline.next}`) : []));
  // Read aloud when it becomes another state, not whenever a figure in it moves.
  if (line.said !== `${level} ${headline.code}`) {
    line.said = `${level} ${headline.code}`;
    say(byId("said"), `${LEVELS[level].word}: ${headline.text}`);
  }
  document.title = `${LEVELS[level].word} · ${view.group}: ${headline.text}`;
  const colours = { ok: "%230a6b3d", busy: "%230b5cad", warn: "%238a5200", bad: "%23b3141b" };
  const path = `%3Cpath d='${LEVELS[level].path}' fill='none' stroke='${colours[level]}' stroke-width='1.6'/%3E`;
  const icon = `data:image/svg+xml,%3Csvg xmlns='${SVG}' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' fill='white'/%3E${path}%3C/svg%3E`;
  if (line.icon !== icon) {
    line.icon = icon;
    byId("icon").href = icon;
  }
}

function showAll(view) {
  showTop(view);
  showHeadline(view);
  showFigures(view);
  showFlow(view);
  showLetters(view);
  byId("reasons").hidden = !(view.reasons?.length > 0);
  for (const [list, grid] of page.lists) grid.fill(list.rows(view) ?? [], view.at);
  byId("charts").hidden = !view.flow && !(view.history?.points?.length > 0);
  for (const chart of page.charts) chart.fill(view.history, view.at);
  page.shards.fill(view.shards ?? [], view.at);
}

/** The worker answered. */
function heard(view) {
  line.view = view;
  line.heardAt = Date.now();
  line.since = undefined;
  line.wait = EVERY_MS;
  document.body.classList.remove("stale");
  byId("unheard").hidden = true;
  show(byId("line"), "heard", () => [make("span", "tag ok", shape("ok"), " live"), make("span", "note", "asked every 2 s")]);
  showAll(view);
}

/** It did not. What is shown is grey from now on, and says from when it is. */
function unheard(why) {
  line.since ??= line.heardAt ?? Date.now();
  line.why = why;
  line.wait = Math.min(line.wait * 2, SLOWEST_MS);
  document.body.classList.add("stale");
  byId("unheard").hidden = false;
  showSilence();
  document.title = `NO ANSWER · ${line.view?.group ?? "Farshore"}`;
}

/** Says since when nobody answers: once in words that are read aloud, the seconds beside them. */
function showSilence() {
  if (line.since === undefined) return;
  const since = new Date(line.since).toISOString();
  const what = line.view
    ? `The worker has not answered since ${moment(since, Date.now())} UTC. All below is as it was then and ages.`
    : "The worker does not answer.";
  show(byId("unheard"), [what, line.why], () => [
    make("strong", "", what),
    make("p", "", `${line.why}. Look whether it runs, or ask the state table with `, make("code", "", "farshore status"), "."),
  ]);
  const silent = rough((Date.now() - line.since) / 1000);
  show(byId("line"), ["unheard", silent], () => [make("span", "tag bad", shape("bad"), " no answer"), make("span", "note", `for ${silent}`)]);
}

async function ask() {
  const cut = new AbortController();
  const bound = setTimeout(() => cut.abort(), PATIENCE_MS);
  try {
    const response = await fetch("status", { cache: "no-store", signal: cut.signal });
    if (!response.ok) return { why: `It answered ${response.status} to /status` };
    const view = await response.json();
    if (view.version !== 1) return { why: `It answered version ${view.version} of /status, and this page reads version 1: load it again` };
    return { view };
  } catch (error) {
    if (error.name === "AbortError") return { why: `Nothing came within ${PATIENCE_MS / 1000} s` };
    return { why: error instanceof SyntaxError ? "What it answered was no JSON" : "It could not be reached" };
  } finally {
    clearTimeout(bound);
  }
}

async function round() {
  if (line.asking) return;
  line.asking = true;
  clearTimeout(line.timer);
  try {
    const { view, why } = await ask();
    if (view) heard(view);
    else unheard(why);
  } catch (error) {
    // Half of an answer must not look like a whole one.
    console.error(error);
    unheard("What it answered could not be shown: load the page again");
  } finally {
    line.asking = false;
    // A page that nobody looks at asks slowly; it asks at once when it is looked at again.
    line.timer = setTimeout(round, document.hidden ? SLOWEST_MS : line.wait);
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) round();
});
let resized;
window.addEventListener("resize", () => {
  cancelAnimationFrame(resized);
  resized = requestAnimationFrame(() => line.view && page.charts.forEach((chart) => chart.paint()));
});
setInterval(showSilence, 1000);
round();
