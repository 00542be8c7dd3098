// The figures, the regions and what flows between them.

/** Younger than this, headroom is an alarm: the same six hours as in the alert rules. */
const HEADROOM_LOW = 6 * HOUR;
/** Older than this, the recovery point is an alarm: the same five minutes as in the alert rules. */
const RECOVERY_OLD = 300;

const REGION_STATES = {
  ok: ["ok", "answers"],
  unreachable: ["bad", "does not answer"],
  throttled: ["bad", "throttles"],
  refused: ["bad", "refuses"],
  unknown: ["busy", "not asked"],
};

const ROLES = { active: "active: the application writes here", replica: "replica: fed from the active region", quarantined: "quarantined: nobody writes there", other: "not part of this flow" };

/** Whether anything is fed where this is seen from: not where the region is active. */
function isFed(view) {
  return view.flow !== null && view.flow !== undefined;
}

/** Records a second over the last step of the history. */
function rateNow(view) {
  return view.history?.points?.at(-1)?.recordsPerSecond;
}

/** The largest lag of the moment; undefined where nothing was applied lately. */
function lagNow(view) {
  const lags = (view.tables ?? []).map((table) => table.lagSeconds).filter(known);
  return lags.length > 0 ? Math.max(...lags) : undefined;
}

/** `{name, value, unknown, level, note, big}` of every figure. */
function figures(view) {
  const fed = isFed(view);
  const absent = fed ? "unknown" : "not fed";
  const point = view.recoveryPoint ?? {};
  const old = (seconds) => (fed && !(seconds <= RECOVERY_OLD) ? "warn" : undefined);
  const letters = view.deadLetters ?? {};
  const doubts = (view.doubts ?? []).reduce((sum, of) => sum + of.open, 0);
  return [
    { name: "Recovery point, proven", seconds: point.provenSeconds, absent, level: old(point.provenSeconds), big: true,
      note: known(point.provenSeconds) || !fed ? "all that is older is in the replica, by records and shard ends" : "nothing shows how old the copy is" },
    { name: "Recovery point, estimated", seconds: point.estimatedSeconds, absent, level: old(point.estimatedSeconds), big: true,
      note: "empty pages of idle shards counted as well" },
    { name: "Headroom", seconds: view.headroomSeconds, absent, big: true,
      level: known(view.headroomSeconds) && view.headroomSeconds < HEADROOM_LOW ? "warn" : undefined,
      note: "until the stream forgets what may not be applied" },
    { name: "Lag", seconds: lagNow(view), absent: fed ? "nothing applied" : absent, note: "largest of the last ten seconds" },
    { name: "Records", text: known(rateNow(view)) ? rate(rateNow(view)) : undefined, absent, note: "applied by this worker" },
    { name: "Dead letters", text: known(letters.waiting) ? count(letters.waiting) : undefined, absent: "unknown", level: letters.waiting > 0 ? "warn" : undefined,
      note: known(letters.oldestSecondsLeft) ? `oldest forgotten in ${rough(letters.oldestSecondsLeft)}` : "wait to be brought home" },
    { name: "Doubts", text: count(doubts), note: "ranges to be repaired" },
  ];
}

function figureValue(figure) {
  if (figure.text !== undefined) return [figure.text];
  if (!known(figure.seconds)) return [make("span", "absent", figure.absent)];
  return spanParts(figure.seconds).flatMap(([number, unit], index) => [index > 0 ? " " : "", String(number), make("small", "", ` ${unit}`)]);
}

function showFigures(view) {
  const all = figures(view);
  show(byId("figures"), all, () => all.map((figure) => {
    const value = make("dd", "value", ...figureValue(figure));
    if (figure.level) value.append(" ", make("span", `tag ${figure.level}`, shape(figure.level), make("span", "unseen", LEVELS[figure.level].word)));
    return make("div", figure.big ? "figure big" : "figure", make("dt", "", figure.name), value, make("dd", "note", figure.note));
  }));
}

/** What the flow does: `[kind, sentence]`, `kind` being one of those that the style sheet draws. */
function flowState(view) {
  const of = (label) => view.regions.find((region) => region.label === label);
  const down = (region) => region && !["ok", "unknown"].includes(region.state);
  const paused = view.tables.filter((table) => table.paused);
  if (down(of(view.flow.source))) return ["broken", "cannot be read"];
  if (down(of(view.flow.target))) return ["broken", "cannot be written"];
  if (view.tables.length > 0 && paused.length === view.tables.length) return ["closed", "tap closed"];
  const speed = rateNow(view);
  const some = paused.length > 0 ? `, ${many(paused.length, "table")} paused` : "";
  if (speed > 0) return ["flowing", `${rate(speed)}${some}`];
  return ["still", `nothing to apply${some}`];
}

const ARROWS = {
  flowing: "M2 12H86M76 4l12 8-12 8",
  still: "M2 12H86M76 4l12 8-12 8",
  closed: "M2 12H34M56 12H86M76 4l12 8-12 8M41 3V21M49 3V21",
  broken: "M2 12H36M54 12H86M76 4l12 8-12 8M38 5l14 14M52 5 38 19",
};

function regionCard(region, view) {
  const [level, word] = REGION_STATES[region.state] ?? REGION_STATES.unknown;
  const since = region.since ? [" since ", time(region.since, view.at)] : [];
  const from = region.label === view.here ? "; this page is seen from here" : "";
  const card = make("div", "region", make("strong", "", region.label), make("span", "note", (ROLES[region.role] ?? region.role) + from),
    make("span", `tag ${level}`, shape(level), " ", word, ...since));
  if (region.text) card.append(make("span", "note", region.text));
  return card;
}

function showFlow(view) {
  const regions = view.regions ?? [];
  const state = view.flow ? flowState(view) : undefined;
  show(byId("flow"), [regions, view.flow, state, view.here, view.at?.slice(0, 10)], () => {
    if (!view.flow) return regions.map((region) => make("li", "", regionCard(region, view)));
    const [kind, text] = state;
    const arrow = draw("svg", { viewBox: "0 0 90 24", class: `arrow ${kind}`, "aria-hidden": "true" }, draw("path", { d: ARROWS[kind] }));
    const at = (label) => {
      const region = regions.find((one) => one.label === label) ?? { label, role: "other", state: "unknown" };
      return make("li", "", regionCard(region, view));
    };
    const words = make("span", "note", make("span", "unseen", `from ${view.flow.source} to ${view.flow.target}: `), text);
    return [at(view.flow.source), make("li", "between", arrow, words), at(view.flow.target)];
  });
  const others = view.flow ? regions.filter((region) => ![view.flow.source, view.flow.target].includes(region.label)) : [];
  byId("others").hidden = others.length === 0;
  show(byId("others"), [others, view.here], () => others.map((region) => make("li", "", regionCard(region, view))));
}
