// Numbers and moments as a person says them.

const COUNT = new Intl.NumberFormat("en");

/** A number with its thousands apart. */
function count(number) {
  return COUNT.format(number);
}

/** `many(1, "gap")` is "1 gap", `many(2, "gap")` "2 gaps". */
function many(number, what) {
  return `${count(number)} ${what}${number === 1 ? "" : "s"}`;
}

function known(number) {
  return typeof number === "number" && Number.isFinite(number);
}

/** Seconds as the pairs of number and unit that are worth reading. */
function spanParts(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (seconds < 10) return [[Math.max(0, seconds).toFixed(1), "s"]];
  if (whole < 60) return [[whole, "s"]];
  if (whole < 3600) return [[Math.floor(whole / 60), "min"], [whole % 60, "s"]];
  if (whole < 86400) return [[Math.floor(whole / 3600), "h"], [Math.floor((whole % 3600) / 60), "min"]];
  return [[Math.floor(whole / 86400), "d"], [Math.floor((whole % 86400) / 3600), "h"]];
}

/** Seconds in words; `absent` where nobody knows. */
function span(seconds, absent = "unknown") {
  if (!known(seconds)) return absent;
  return spanParts(seconds).map(([number, unit]) => `${number} ${unit}`).join(" ");
}

/** Seconds as one says them of what is about so long. */
function rough(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** Seconds, short: for axes. */
function brief(seconds) {
  if (seconds >= 86400) return `${+(seconds / 86400).toFixed(1)} d`;
  if (seconds >= 3600) return `${+(seconds / 3600).toFixed(1)} h`;
  if (seconds >= 60) return `${+(seconds / 60).toFixed(1)} min`;
  return `${+seconds.toFixed(2)} s`;
}

/** A rate of records. */
function rate(perSecond) {
  if (!known(perSecond)) return "unknown";
  if (perSecond > 0 && perSecond < 10) return `${perSecond.toFixed(1)}/s`;
  return `${count(Math.round(perSecond))}/s`;
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

function two(number) {
  return String(number).padStart(2, "0");
}

/** A moment's time of day in UTC, with the day where it is not today's; `today` is a moment of today. */
function moment(at, today) {
  const date = new Date(at);
  if (Number.isNaN(date.getTime())) return String(at);
  const time = `${two(date.getUTCHours())}:${two(date.getUTCMinutes())}:${two(date.getUTCSeconds())}`;
  const same = today !== undefined && new Date(today).toISOString().slice(0, 10) === date.toISOString().slice(0, 10);
  return same ? time : `${date.getUTCDate()} ${MONTHS[date.getUTCMonth()]} ${time}`;
}

/** Seconds from one moment to another; undefined where either is none. */
function secondsBetween(from, to) {
  const seconds = (new Date(to) - new Date(from)) / 1000;
  return Number.isNaN(seconds) ? undefined : seconds;
}

/** The part of a process start that tells it from the others: the host. */
function host(id) {
  return String(id).split("#")[0];
}
