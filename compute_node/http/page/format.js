// Numbers for people.

export const NOTHING = "–";

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 999.5 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count.toFixed(0) : significant(count)} ${UNITS[unit]}`;
}

export const bytesPerSecond = (count) => (count === null ? NOTHING : `${bytes(count)}/s`);

export function seconds(value) {
  if (value === null) return NOTHING;
  if (value < 0.9995) return `${significant(value * 1000)} ms`;
  if (value < 99.5) return `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export const percent = (share) => (share === null ? NOTHING : `${(100 * share).toFixed(1)} %`);
export const wholePercent = (share) => (share === null ? NOTHING : `${Math.round(100 * share)} %`);
export const count = (value) => value.toLocaleString("en");
export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
// The request's own name comes first and what tells its answers apart last.
export const shortId = (id) => (id.length <= 16 ? id : `${id.slice(0, 8)}…${id.slice(-4)}`);
export const localTime = (unixSeconds) => new Date(1000 * unixSeconds).toLocaleString();

function significant(value) {
  return value >= 99.5 ? value.toFixed(0) : value >= 9.95 ? value.toFixed(1) : value.toFixed(2);
}
