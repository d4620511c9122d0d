// Numbers, times and ticks as text. Pure functions.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(number) {
  return whole.format(number);
}

/** About `digits` significant digits; very small and very large numbers by exponent. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(Math.max(digits - 2, 1)).replace("e+", "e");
  const places = Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size || 1))));
  return new Intl.NumberFormat("en", { maximumFractionDigits: places, minimumFractionDigits: Math.min(places, 2) }).format(value);
}

/** A label of an axis: as short as it can be. */
export function tick(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e10) return value.toExponential(1).replace("e+", "e").replace(".0e", "e");
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return `${+value.toPrecision(4)}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const all = Math.round(seconds);
  const two = (part) => String(part).padStart(2, "0");
  if (all < 3600) return `${Math.floor(all / 60)} min ${two(all % 60)} s`;
  if (all < 86400 * 2) return `${Math.floor(all / 3600)} h ${two(Math.floor((all % 3600) / 60))} min`;
  return `${Math.floor(all / 86400)} d ${Math.floor((all % 86400) / 3600)} h`;
}

/** Seconds since the Unix epoch as a time of day, with the day if it is another one. */
export function clock(seconds, now = new Date()) {
  const date = new Date(seconds * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === now.toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}

/** Round values that divide [low, high] into about `wanted` parts. */
export function ticks(low, high, wanted) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / Math.max(wanted, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= raw * 0.999);
  const values = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + span * 1e-9; at += 1) values.push(+(at * step).toPrecision(12));
  return values;
}

/** Powers of ten in [low, high], or a few of them. */
export function decades(low, high, wanted) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  if (last <= first) return ticks(low, high, wanted).filter((value) => value > 0);
  const stride = Math.max(1, Math.ceil((last - first + 1) / (wanted + 1)));
  const values = [];
  for (let power = first; power <= last; power += stride) values.push(10 ** power);
  return values;
}
