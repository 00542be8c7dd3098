// The tables of the page.

const whole = (text) => ({ text, code: true });

/** What a table is at, the worst first. */
function tableState(table) {
  const state = [];
  const shards = table.shards ?? {};
  if (table.gaps > 0) state.push({ text: many(table.gaps, "gap"), level: "bad" });
  if (shards.unowned > 0) state.push({ text: `${many(shards.unowned, "shard")} without owner`, level: "warn" });
  if (table.paused) state.push({ text: "paused", level: "warn", note: `by ${table.paused.by}: ${table.paused.reason}` });
  if (table.drift > 0) state.push({ text: `${many(table.drift, "item")} differ`, level: "bad" });
  if (table.copying) {
    const left = known(table.copying.leftSeconds) ? `, about ${rough(table.copying.leftSeconds)} left` : "";
    state.push({ text: `copying ${table.copying.percent} %${left}`, level: "busy", bar: table.copying.percent });
  }
  if (table.doubts > 0) state.push({ text: many(table.doubts, "doubt"), level: "busy" });
  return state.length > 0 ? state : [{ text: "followed", level: "ok" }];
}

function tableName(table) {
  const renamed = table.source !== table.target || table.name !== table.source;
  return { text: table.name, note: renamed ? `${table.source} → ${table.target}` : undefined };
}

/** Whether somebody who lives looks after a shard. */
function isOwned(shard) {
  return Boolean(shard.owner) && shard.alive;
}

/** How urgent a shard is: 0 is the worst. */
function urgency(shard) {
  if (shard.state === "finished") return 5;
  if (shard.state === "waits-for-parent") return 4;
  if (!isOwned(shard)) return 0;
  if (!known(shard.ageSeconds)) return 1;
  return shard.ageSeconds > RECOVERY_OLD ? 2 : 3;
}

function shardState(shard) {
  if (shard.state === "finished") return { text: "finished", level: "ok" };
  if (shard.state === "waits-for-parent") return { text: "waits for its parent", level: "busy" };
  if (!shard.owner) return { text: "no owner", level: "warn" };
  if (!shard.alive) return { text: "owner is silent", level: "warn", note: known(shard.ownerSilentSeconds) ? `for ${rough(shard.ownerSilentSeconds)}` : undefined };
  return { text: "read", level: "ok" };
}

function shardAge(shard) {
  if (shard.state === "finished") return "";
  return known(shard.ageSeconds) ? span(shard.ageSeconds) : "unknown";
}

const SHARD_ORDERS = {
  worst: (a, b) => urgency(a) - urgency(b),
  oldest: (a, b) => (b.state !== "finished" ? b.ageSeconds ?? Infinity : -1) - (a.state !== "finished" ? a.ageSeconds ?? Infinity : -1),
  name: () => 0,
};

const shardKey = (shard) => `${shard.table} ${shard.stream} ${shard.shard}`;

/** The words by which a shard is found. */
function shardWords(shard) {
  return `${shardKey(shard)} ${shard.owner ?? ""} ${shardState(shard).text} ${shard.position}`.toLowerCase();
}

/** Shards as they were asked for, with the order of names under every other one. */
function orderedShards(shards, filter, order) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length === 0 ? [...shards] : shards.filter((shard) => words.every((word) => shardWords(shard).includes(word)));
  const keys = new Map(found.map((shard) => [shard, shardKey(shard)]));
  const byName = (a, b) => (keys.get(a) < keys.get(b) ? -1 : 1);
  // Infinity less itself is no number: both unknown are alike.
  return found.sort((a, b) => SHARD_ORDERS[order](a, b) || byName(a, b));
}

class Shards {
  constructor() {
    this.grid = new Grid(byId("shards"), {
      caption: "Shards with state, owner, age and position",
      none: "No shard to show.",
      fits: 880,
      key: shardKey,
      columns: [
        { head: "Shard", cell: (shard) => [whole(shard.shard), { note: shard.table }], kind: "wide" },
        { head: "State", cell: shardState, kind: "state" },
        { head: "Age", cell: shardAge, kind: "number" },
        { head: "Headroom", cell: (shard) => (shard.state === "finished" ? "" : span(shard.headroomSeconds)), kind: "number" },
        { head: "Owner", cell: (shard) => (shard.owner ? { text: host(shard.owner), note: shard.owner.split("#")[1] } : shard.state === "finished" ? "" : "nobody"), kind: "name" },
        { head: "Position", cell: (shard) => whole(shard.position), kind: "wide" },
      ],
    });
    byId("shards-form").addEventListener("submit", (event) => event.preventDefault());
    byId("shards-filter").addEventListener("input", () => this.again());
    for (const id of ["shards-order", "shards-finished"]) byId(id).addEventListener("change", () => this.again());
  }

  fill(shards, today) {
    this.shards = shards;
    this.today = today;
    this.again();
  }

  again() {
    if (!this.shards) return;
    const open = this.shards.filter((shard) => shard.state !== "finished");
    const asked = byId("shards-finished").checked ? this.shards : open;
    const found = orderedShards(asked, byId("shards-filter").value, byId("shards-order").value);
    const alone = open.filter((shard) => shard.state === "open" && !isOwned(shard)).length;
    const of = found.length === asked.length ? "" : `${count(found.length)} found of `;
    const lost = alone > 0 ? `, ${count(alone)} without a living owner` : "";
    say(byId("shards-count"), `${of}${many(this.shards.length, "shard")}: ${count(open.length)} open${lost}, ${count(this.shards.length - open.length)} finished lately`);
    this.grid.fill(found, this.today);
  }
}

/** All other tables: where, of which rows, with which columns. */
const LISTS = {
  "reasons-table": {
    caption: "Why this worker is not ready, and what to do",
    none: "",
    rows: (view) => view.reasons,
    key: (reason) => `${reason.code} ${reason.table}`,
    columns: [
      { head: "Code", cell: (reason) => whole(reason.code) },
      { head: "Table", cell: (reason) => reason.table || "all" },
      { head: "What", cell: (reason) => reason.text, kind: "prose" },
      { head: "What to do", cell: (reason) => reason.next, kind: "prose" },
    ],
  },
  tables: {
    caption: "Tables with recovery point, lag, headroom and shards",
    fits: 880,
    none: "Nothing is fed from here.",
    rows: (view) => view.tables,
    key: (table) => table.name,
    columns: [
      { head: "Table", cell: tableName, kind: "wide" },
      { head: "State", cell: tableState, kind: "state" },
      { head: "Proven", cell: (table) => span(table.recoveryPoint?.provenSeconds), kind: "number" },
      { head: "Estimated", cell: (table) => span(table.recoveryPoint?.estimatedSeconds), kind: "number" },
      { head: "Lag", cell: (table) => span(table.lagSeconds, "—"), kind: "number" },
      { head: "Headroom", cell: (table) => span(table.headroomSeconds), kind: "number" },
      { head: "Open shards", cell: (table) => count(table.shards?.open ?? 0), kind: "number" },
      { head: "Records", cell: (table) => (known(table.recordsTotal) ? count(table.recordsTotal) : "—"), kind: "number" },
      { head: "Found equal", cell: (table) => (table.verifiedAt ? { at: table.verifiedAt } : "never"), kind: "number" },
    ],
  },
  "gaps-table": {
    caption: "Records that were never applied",
    fits: 600,
    none: "No gap: every record was applied, dead-lettered or waits.",
    rows: (view) => view.gaps,
    key: (gap) => `${gap.table} ${gap.reason} ${gap.detail}`,
    columns: [
      { head: "Table", cell: (gap) => gap.table },
      { head: "Why", cell: (gap) => [{ text: gap.reason, level: "bad" }, { note: gap.detail }], kind: "wide" },
      { head: "Noticed", cell: (gap) => ({ at: gap.at }) },
      { head: "What to do", cell: (gap) => gap.next, kind: "prose" },
    ],
  },
  "letters-table": {
    caption: "Dead letters by table and reason",
    none: "",
    rows: (view) => view.deadLetters?.byReason,
    key: (letters) => `${letters.table} ${letters.class}`,
    columns: [
      { head: "Table", cell: (letters) => letters.table },
      { head: "Reason", cell: (letters) => whole(letters.class) },
      { head: "Sent by this worker", cell: (letters) => count(letters.count), kind: "number" },
    ],
  },
  "doubts-table": {
    caption: "Ranges whose writes may still take effect, by table",
    none: "No doubt.",
    rows: (view) => view.doubts,
    key: (doubts) => doubts.table,
    columns: [
      { head: "Table", cell: (doubts) => doubts.table },
      { head: "Open", cell: (doubts) => count(doubts.open), kind: "number" },
      { head: "Repaired from", cell: (doubts) => ({ at: doubts.until }) },
      { head: "Overdue", cell: (doubts) => (doubts.overdue > 0 ? { text: count(doubts.overdue), level: "bad" } : "none"), kind: "number" },
    ],
  },
  "pauses-table": {
    caption: "Closed taps",
    none: "No tap is closed.",
    rows: (view) => view.pauses,
    key: (pause) => pause.table ?? "",
    columns: [
      { head: "Table", cell: (pause) => pause.table ?? "all" },
      { head: "By", cell: (pause) => pause.by, kind: "name" },
      { head: "Because", cell: (pause) => pause.reason, kind: "prose" },
      { head: "Since", cell: (pause) => ({ at: pause.at }) },
    ],
  },
  "jobs-table": {
    caption: "Copies, repairs and comparisons",
    none: "No job is at work.",
    rows: (view) => view.jobs,
    key: (job) => job.id,
    columns: [
      { head: "Job", cell: (job) => ({ text: job.kind, note: job.id }) },
      { head: "Table", cell: (job) => ({ text: job.table, note: `${job.source} → ${job.target}` }) },
      { head: "Progress", cell: jobProgress },
      { head: "Differ", cell: (job) => count(job.different ?? 0), kind: "number" },
    ],
  },
  workers: {
    caption: "Processes of the fleet",
    fits: 350,
    none: "No worker has a row in the state table.",
    rows: (view) => view.workers,
    key: (worker) => worker.id,
    columns: [
      { head: "Worker", cell: (worker) => [{ text: host(worker.id), note: worker.id.split("#")[1] }], kind: "wide" },
      { head: "State", cell: workerState },
      { head: "Shards", cell: (worker) => count(worker.shards ?? 0), kind: "number" },
      { head: "Version", cell: (worker) => worker.version },
      { head: "Started", cell: (worker) => ({ at: worker.since }) },
    ],
  },
  events: {
    caption: "What changed, newest first",
    none: "Nothing has changed since this worker started.",
    rows: (view) => view.events,
    key: (event) => `${event.at} ${event.table ?? ""} ${event.text}`,
    limit: 10,
    columns: [
      { head: "At", cell: (event) => ({ at: event.at }), kind: "at" },
      { head: "Event", cell: eventText, kind: "prose" },
    ],
  },
};

function jobProgress(job) {
  const left = known(job.secondsLeft) ? `about ${rough(job.secondsLeft)} left` : undefined;
  const extra = known(job.deletesOutstanding)
    ? { text: `${count(job.deletesOutstanding)} deletes wait for a person`, level: "warn", note: known(job.deletesAllowed) ? `${count(job.deletesAllowed)} are allowed` : undefined }
    : [];
  const aim = job.applies ? "repairs" : "compares only";
  if (job.ended) return [{ text: "ended", level: "ok", note: aim }, extra].flat();
  if (!job.alive) return [{ text: "nobody is at it", level: "warn", bar: job.percent, note: `${job.percent} %, ${aim}` }, extra].flat();
  return [{ text: `${job.percent} %`, level: "busy", bar: job.percent, note: left ? `${left}, ${aim}` : aim }, extra].flat();
}

function workerState(worker) {
  if (!worker.alive) return { text: "silent", level: "warn", since: worker.updatedAt };
  return worker.leaving ? { text: "leaving", level: "busy" } : { text: "at work", level: "ok" };
}

const EVENT_LEVELS = { info: undefined, warn: "warn", error: "bad" };

function eventText(event) {
  return [{ text: event.text, level: EVENT_LEVELS[event.level] }, { note: event.table ?? undefined }];
}

function showLetters(view) {
  const letters = view.deadLetters ?? {};
  const waiting = known(letters.waiting) ? letters.waiting : undefined;
  const facts = [letters, view.at?.slice(0, 10)];
  show(byId("letters-text"), facts, () => {
    if (waiting === undefined) return ["How many wait is not known from here; ", make("code", "", "farshore dead-letters"), " counts them."];
    if (waiting === 0) return [make("span", "none", "None waits.")];
    const left = known(letters.oldestSecondsLeft) ? ` The queue forgets the oldest in ${rough(letters.oldestSecondsLeft)}.` : "";
    return [make("span", "tag warn", shape("warn"), ` ${many(waiting, "letter")} wait`), `${left} Mend what the replica refused, then `, make("code", "", "farshore redrive --apply"), "."];
  });
}
